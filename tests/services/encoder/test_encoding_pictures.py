"""Pictures through the encoder's real server: part of every prompt's conditioning, from the cache, or refused."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from safelight.errors import InvalidRequestError, UnsupportedError, from_rpc_error
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from safelight.v1.work_pb2 import (
    DETERMINISM_CLASS_EXACT,
    DETERMINISM_CLASS_UNSPECIFIED,
    MEDIA_ROLE_IMAGE,
    MEDIA_ROLE_MASK,
    MediaInput,
)
from services.common.exchange import BytesPayload
from services.encoder.service import build_encoder
from services.encoder.settings import EncoderSettings
from services.modeling.wire import to_tensor
from tests.serving import Running, StartStage
from tests.support.tiny_wan import IMAGE_TOKENS, IMAGE_WIDTH, save_tiny_wan, save_tiny_wan_i2v


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    models = [
        {"name": "led", "path": str(save_tiny_wan_i2v(folder / "led"))},
        {"name": "words", "path": str(save_tiny_wan(folder / "words"))},
    ]
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"models": models}))
    return str(folder / "manifest.yaml")


class Encoder:
    """A running encoder, and calls to it."""

    def __init__(self, running: Running) -> None:
        self._server = running.server
        self._stub = EncoderServiceStub(running.channel)

    async def encode(self, *pictures: bytes, exact: bool = False, **fields: Any) -> EncodeResponse:
        request = EncodeRequest(
            model="led",
            prompts=["a cat", "the dog"],
            inputs=[MediaInput(role=MEDIA_ROLE_IMAGE, data=data) for data in pictures],
            determinism=DETERMINISM_CLASS_EXACT if exact else DETERMINISM_CLASS_UNSPECIFIED,
            **fields,
        )
        return await self._stub.Encode(request, timeout=60)

    async def failure(self, request: EncodeRequest) -> Exception:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._stub.Encode(request, timeout=60)
        return from_rpc_error(caught.value)

    def hits(self) -> float:
        found = self._server.metrics.registry.get_sample_value("safelight_cache_hits_total", {"cache": "embeddings"})
        return found or 0.0


Start = Callable[..., Awaitable[Encoder]]


@pytest.fixture
def start(start_stage: StartStage, manifest: str) -> Start:
    async def start_encoder(**settings: Any) -> Encoder:
        return Encoder(await start_stage(EncoderSettings(manifest=manifest, device="cpu", **settings), build_encoder))

    return start_encoder


def picture(colour: str, size: tuple[int, int] = (80, 48)) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
    image = Image.open(file)
    image.paste(colour, (0, 0, size[0] // 2, size[1] // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def embeds(prompt: EncodedPrompt) -> Tensor:
    named = {each.name: each.tensor for each in prompt.conditioning.tensors}
    assert set(named) == {"prompt_embeds", "image_embeds"}
    ref = named["image_embeds"]
    return to_tensor(ref.header, BytesPayload(ref.inline))


async def test_pictures_are_part_of_every_prompts_conditioning_in_their_order(start: Start) -> None:
    encoder = await start(cache_bytes=0)
    both = await encoder.encode(picture("red"), picture("blue"))
    alone = [await encoder.encode(picture(colour)) for colour in ("red", "blue")]
    expected = torch.cat([embeds(response.prompts[0]) for response in alone], dim=1)
    for prompt in both.prompts:
        assert embeds(prompt).shape == (1, 2 * IMAGE_TOKENS, IMAGE_WIDTH)
        torch.testing.assert_close(embeds(prompt), expected, rtol=1e-5, atol=1e-5)


async def test_a_picture_seen_before_comes_from_the_cache_at_the_same_size_only(start: Start) -> None:
    encoder = await start()
    first, again = [embeds((await encoder.encode(picture("red"))).prompts[0]) for _ in range(2)]
    assert torch.equal(first, again)
    assert encoder.hits() == 3  # both prompts, and the picture
    smaller = await encoder.encode(picture("red"), width=32, height=32)
    assert encoder.hits() == 5
    assert not torch.equal(embeds(smaller.prompts[0]), first)


async def test_a_picture_of_the_exact_class_equals_its_solo_run_bit_for_bit(start: Start) -> None:
    here, there = await start(cache_bytes=0), await start(batch_wait_seconds=0.1)
    solo = embeds((await here.encode(picture("red"), exact=True)).prompts[0])
    company = embeds((await there.encode(picture("red"), picture("blue"), exact=True)).prompts[0])
    assert torch.equal(company[:, :IMAGE_TOKENS], solo)


def request(role: Any = MEDIA_ROLE_IMAGE, data: bytes = b"", model: str = "led", **fields: Any) -> EncodeRequest:
    given = [MediaInput(role=role, data=data or picture("red"))]
    return EncodeRequest(model=model, prompts=["a cat"], inputs=given, **fields)


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (request(data=b"no picture"), InvalidRequestError, "inputs[0].data"),
        (request(data=picture("red")[:80]), InvalidRequestError, "inputs[0].data"),
        (request(role=MEDIA_ROLE_MASK), UnsupportedError, "MEDIA_ROLE_IMAGE"),
        (request(role=77), UnsupportedError, "inputs"),
        (request(model="words"), UnsupportedError, "inputs: this model takes text only"),
        (request(width=64), InvalidRequestError, "height"),
        (request(width=100_000, height=64), InvalidRequestError, "width"),
        (request(width=16_384, height=16_384), InvalidRequestError, "width: 16384x16384 has more than"),
    ],
)
async def test_bad_pictures_are_refused_by_name_and_the_service_goes_on(
    start: Start, request_: EncodeRequest, kind: type[Exception], field: str
) -> None:
    encoder = await start()
    error = await encoder.failure(request_)
    assert isinstance(error, kind)
    assert field in str(error)
    assert (await encoder.encode(picture("red"))).prompts
