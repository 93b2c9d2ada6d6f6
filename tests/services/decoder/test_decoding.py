"""The decoder through its real server: file formats, metadata, tiling, encoding and bad input."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from safelight.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    NonFiniteError,
    TensorCorruptError,
    UnknownModelError,
    from_rpc_error,
)
from safelight.v1 import work_pb2
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResult, EncodeImageRequest
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from safelight.v1.tensor_pb2 import TensorLease
from services.common.exchange import BytesPayload
from services.decoder.images import read_parameters
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from services.modeling.wire import to_tensor
from tests.serving import Running, StartStage
from tests.support.stage_requests import decode_request

LATENTS = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))


class Decoder:
    """A running decoder, and calls to it."""

    def __init__(self, running: Running, address: str) -> None:
        self.address = address
        self.stub = DecoderServiceStub(running.channel)

    async def decode(self, request: DecodeRequest) -> tuple[bytes, DecodeResult]:
        events = [event async for event in self.stub.Decode(request, timeout=60)]
        return b"".join(event.chunk.data for event in events[:-1]), events[-1].result

    async def failure(self, request: DecodeRequest) -> Exception:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.decode(request)
        return from_rpc_error(caught.value)


Start = Callable[..., Awaitable[Decoder]]


@pytest.fixture
def start(start_stage: StartStage, tiny_manifest: str) -> Start:
    async def start_decoder(**settings: Any) -> Decoder:
        running = await start_stage(DecoderSettings(manifest=tiny_manifest, device="cpu", **settings), build_decoder)
        return Decoder(running, running.server.address)

    return start_decoder


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("output_format", "media_type"),
    [
        (work_pb2.OUTPUT_FORMAT_UNSPECIFIED, "image/png"),
        (work_pb2.OUTPUT_FORMAT_PNG, "image/png"),
        (work_pb2.OUTPUT_FORMAT_JPEG, "image/jpeg"),
        (work_pb2.OUTPUT_FORMAT_WEBP, "image/webp"),
    ],
)
async def test_a_latent_becomes_a_picture_file_with_its_parameters(
    start: Start, output_format: work_pb2.OutputFormat.ValueType, media_type: str
) -> None:
    request = decode_request(LATENTS)
    request.output.format = output_format
    request.parameters.CopyFrom(work_pb2.GenerationParameters(prompt="a cat", seed=7, model="tiny"))
    data, result = await (await start()).decode(request)
    assert (result.media_type, result.width, result.height) == (media_type, 96, 64)
    assert (result.file_size, result.sha256) == (len(data), hashlib.sha256(data).digest())
    assert pixels(data).shape == (64, 96, 3)
    parameters = read_parameters(data)
    assert parameters is not None
    assert (parameters["prompt"], parameters["seed"]) == ("a cat", 7)


async def test_metadata_is_left_out_on_request(start: Start) -> None:
    request = decode_request(LATENTS)
    request.output.omit_metadata = True
    data, _ = await (await start()).decode(request)
    assert read_parameters(data) is None


async def test_latents_come_back_bit_for_bit_on_request(start: Start) -> None:
    request = decode_request(LATENTS)
    request.output.format = work_pb2.OUTPUT_FORMAT_LATENTS
    data, result = await (await start()).decode(request)
    assert torch.equal(safetensors.torch.load(data)["latents"], LATENTS)
    assert result.width == 0


async def test_every_piece_of_a_file_tells_its_place(start: Start) -> None:
    decoder = await start()
    request = decode_request(torch.randn(1, 4, 300, 300))
    request.output.format = work_pb2.OUTPUT_FORMAT_LATENTS
    chunks = [event.chunk async for event in decoder.stub.Decode(request, timeout=60) if event.HasField("chunk")]
    ends = [chunk.offset + len(chunk.data) for chunk in chunks]
    assert len(chunks) > 1
    assert [chunk.offset for chunk in chunks] == [0, *ends[:-1]]
    assert ends[-1] == chunks[0].file_size


async def test_a_latent_beyond_the_untiled_area_is_decoded_in_tiles(start: Start) -> None:
    request = decode_request(torch.randn(1, 4, 24, 24))
    whole, _ = await (await start(untiled_area=24 * 24)).decode(request)
    tiled, _ = await (await start(untiled_area=64, tile_size=12, tile_overlap=4)).decode(request)
    assert pixels(tiled).shape == pixels(whole).shape == (192, 192, 3)
    assert not np.array_equal(pixels(tiled), pixels(whole))  # group norms see one tile at a time


async def test_a_picture_becomes_a_latent(start: Start) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(file, "PNG")
    decoder = await start()
    response = await decoder.stub.EncodeImage(EncodeImageRequest(model="tiny", image=file.getvalue()), timeout=60)
    assert to_tensor(response.latents.header, BytesPayload(response.latents.inline)).shape == (1, 4, 2, 4)


@pytest.mark.parametrize(("image", "reason"), [(b"no picture", "PNG, JPEG or WebP"), (b"", "PNG, JPEG or WebP")])
async def test_what_is_no_picture_is_refused(start: Start, image: bytes, reason: str) -> None:
    decoder = await start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decoder.stub.EncodeImage(EncodeImageRequest(model="tiny", image=image), timeout=60)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert reason in str(error)


def nan_latents(request: DecodeRequest) -> None:
    request.CopyFrom(decode_request(torch.full((1, 4, 8, 8), float("nan"))))


def wrong_channels(request: DecodeRequest) -> None:
    request.CopyFrom(decode_request(torch.zeros(1, 3, 8, 8)))


def truncated(request: DecodeRequest) -> None:
    request.latents.inline = request.latents.inline[:100]


def flipped_bit(request: DecodeRequest) -> None:
    request.latents.header.digest = b"12345678"


def quality_of_png(request: DecodeRequest) -> None:
    request.output.quality = 50


def unknown_format(request: DecodeRequest) -> None:
    request.output.format = 99  # type: ignore[assignment]  # as a client of a later release might send


def planned_with_other_weights(request: DecodeRequest) -> None:
    request.context.fingerprints["decoder"] = "another"


def latents_of_other_weights(request: DecodeRequest) -> None:
    request.context.fingerprints["denoiser"] = "ours"
    request.latents.header.fingerprint = "another"


def unknown_model(request: DecodeRequest) -> None:
    request.model = "nothing"


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (nan_latents, NonFiniteError, "latents"),
        (wrong_channels, InvalidRequestError, "latents"),
        (truncated, TensorCorruptError, "latents"),
        (flipped_bit, TensorCorruptError, "latents"),
        (quality_of_png, InvalidRequestError, "output"),
        (unknown_format, InvalidRequestError, "output.format"),
        (unknown_model, UnknownModelError, "nothing"),
        (planned_with_other_weights, FingerprintMismatchError, "context.fingerprints[decoder]"),
        (latents_of_other_weights, FingerprintMismatchError, "latents"),
    ],
)
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    start: Start, spoil: Callable[[DecodeRequest], None], kind: type[Exception], field: str
) -> None:
    decoder = await start()
    request = decode_request(LATENTS)
    spoil(request)
    error = await decoder.failure(request)
    assert isinstance(error, kind)
    assert field in str(error)
    assert (await decoder.decode(decode_request(LATENTS)))[0]


async def test_a_lease_that_has_ended_is_told_as_such(start: Start) -> None:
    decoder = await start()
    request = decode_request(LATENTS)
    request.latents.lease.CopyFrom(TensorLease(endpoint=decoder.address, exchange_id="gone", ticket="none"))
    assert isinstance(await decoder.failure(request), LeaseExpiredError)
