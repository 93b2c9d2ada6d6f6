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
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResult, EncodeImageRequest, EncodeImageResponse
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from safelight.v1.tensor_pb2 import TensorLease, TensorRef
from services.common.exchange import BytesPayload
from services.decoder.images import read_parameters
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from services.modeling.wire import to_tensor
from tests.serving import Running, StartStage, failure
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

    async def encode(self, **fields: Any) -> EncodeImageResponse:
        return await self.stub.EncodeImage(EncodeImageRequest(model="tiny", **fields), timeout=60)


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
    request.parameters.CopyFrom(work_pb2.GenerationParameters(prompt="a cat", seed=7, model="tiny", strength=0.7))
    data, result = await (await start()).decode(request)
    assert (result.media_type, result.width, result.height) == (media_type, 96, 64)
    assert (result.file_size, result.sha256) == (len(data), hashlib.sha256(data).digest())
    assert pixels(data).shape == (64, 96, 3)
    parameters = read_parameters(data)
    assert parameters is not None
    assert (parameters["prompt"], parameters["seed"]) == ("a cat", 7)
    details = parameters["details"]
    assert isinstance(details, dict)
    assert str(details["Denoising strength"]) == "0.7"


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


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


RED = png(Image.new("RGB", (32, 16), "red"))
LEFT_HALF = png(Image.fromarray(np.repeat([[255, 255, 0, 0]], 2, axis=0).astype(np.uint8)))
"""A mask of 4 by 2 pixels."""


def by_value(ref: TensorRef) -> torch.Tensor:
    return to_tensor(ref.header, BytesPayload(ref.inline))


async def test_a_picture_becomes_a_latent(start: Start) -> None:
    decoder = await start()
    response = await decoder.encode(image=RED)
    assert by_value(response.latents).shape == (1, 4, 2, 4)
    assert response.timing.stage == "decoder"
    assert not response.HasField("mask")


async def test_a_picture_is_encoded_at_the_size_asked_for_and_its_mask_with_it(start: Start) -> None:
    decoder = await start()
    response = await decoder.encode(image=RED, mask=LEFT_HALF, width=64, height=16)
    assert by_value(response.latents).shape == (1, 4, 2, 8)
    assert by_value(response.mask).tolist() == [[[[1.0] * 4 + [0.0] * 4] * 2]]
    same = await decoder.encode(image=png(Image.new("RGB", (64, 16), "red")))
    assert torch.equal(by_value(response.latents), by_value(same.latents))


async def test_the_same_picture_is_the_same_latent(start: Start) -> None:
    noise = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    latents = [by_value((await (await start()).encode(image=noise)).latents) for _ in range(2)]
    assert torch.equal(*latents)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": b"no picture"}, "image: a picture file must be PNG, JPEG or WebP"),
        ({"image": b""}, "image: a picture file must be PNG, JPEG or WebP"),
        ({"image": RED[:60]}, "image: the picture cannot be read"),
        ({"image": RED, "mask": b"no mask"}, "mask: a picture file must be PNG, JPEG or WebP"),
        ({"image": png(Image.new("RGB", (30, 16)))}, "image: has 30x16 pixels; both must be multiples of 8"),
        ({"image": png(Image.new("RGB", (512, 512)))}, "image: the picture has 512x512 pixels and may have 4096"),
        ({"image": RED, "width": 30, "height": 16}, "width: 30x16 must be multiples of 8"),
        ({"image": RED, "width": 32}, "width: 32x0 must be multiples of 8"),
        ({"image": RED, "width": 16384, "height": 16384}, "width: 16384x16384 must be multiples of 8 and at most 4096"),
        ({"image": RED, "width": -8, "height": 8}, "width: -8x8 must be multiples of 8"),
    ],
)
async def test_what_can_not_be_encoded_is_refused_by_name(start: Start, fields: dict[str, Any], named: str) -> None:
    decoder = await start(max_image_pixels=4096)
    error = await failure(decoder.encode(**fields))
    assert isinstance(error, InvalidRequestError)
    assert named in str(error)


async def test_kept_pixels_are_the_original_ones(start: Start) -> None:
    original = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    request = decode_request(LATENTS)
    decoder = await start()
    repainted = pixels((await decoder.decode(request))[0])
    request.original_image, request.mask = png(Image.fromarray(original)), LEFT_HALF
    data, _ = await decoder.decode(request)
    np.testing.assert_array_equal(pixels(data)[:, 48:], original[:, 48:])
    np.testing.assert_array_equal(pixels(data)[:, :48], repainted[:, :48])


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


def mask_without_original(request: DecodeRequest) -> None:
    request.mask = LEFT_HALF


def broken_original(request: DecodeRequest) -> None:
    request.original_image, request.mask = RED[:60], LEFT_HALF


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
        (mask_without_original, InvalidRequestError, "original_image"),
        (broken_original, InvalidRequestError, "original_image"),
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
