"""The encoder through its real server: batches, the cache, truncation and bad input."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from safelight.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    UnknownModelError,
    UnsupportedError,
    from_rpc_error,
)
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from safelight.v1.work_pb2 import (
    DETERMINISM_CLASS_EXACT,
    DETERMINISM_CLASS_UNSPECIFIED,
    MediaInput,
    WorkContext,
)
from services.common.exchange import BytesPayload
from services.encoder.service import build_encoder
from services.encoder.settings import EncoderSettings
from services.modeling.wire import to_tensor
from tests.serving import Running, StartStage

LONG_PROMPT = "a very " * 100 + "long prompt"


class Encoder:
    """A running encoder, and calls to it."""

    def __init__(self, running: Running) -> None:
        self._server = running.server
        self._stub = EncoderServiceStub(running.channel)

    async def encode(
        self, *prompts: str, model: str = "tiny", clip_skip: int = 0, exact: bool = False
    ) -> EncodeResponse:
        determinism = DETERMINISM_CLASS_EXACT if exact else DETERMINISM_CLASS_UNSPECIFIED
        request = EncodeRequest(model=model, prompts=prompts, clip_skip=clip_skip, determinism=determinism)
        return await self._stub.Encode(request, timeout=60)

    async def failure(self, request: EncodeRequest) -> Exception:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._stub.Encode(request, timeout=60)
        return from_rpc_error(caught.value)

    def metric(self, name: str, **labels: str) -> float:
        return self._server.metrics.registry.get_sample_value(name, labels) or 0.0


Start = Callable[..., Awaitable[Encoder]]


@pytest.fixture
def start(start_stage: StartStage, tiny_manifest: str) -> Start:
    async def start_encoder(**settings: Any) -> Encoder:
        return Encoder(
            await start_stage(EncoderSettings(manifest=tiny_manifest, device="cpu", **settings), build_encoder)
        )

    return start_encoder


def embeds(prompt: EncodedPrompt) -> Tensor:
    named = prompt.conditioning.tensors[0]
    assert named.name == "prompt_embeds"
    return to_tensor(named.tensor.header, BytesPayload(named.tensor.inline))


async def test_each_prompt_gets_its_conditioning_in_order(start: Start) -> None:
    encoder = await start(cache_bytes=0)
    both = await encoder.encode("a cat", "a dog")
    alone = [await encoder.encode(prompt) for prompt in ("a cat", "a dog")]
    for together, single in zip(both.prompts, alone, strict=True):
        torch.testing.assert_close(embeds(together), embeds(single.prompts[0]), rtol=1e-5, atol=1e-5)
    assert embeds(both.prompts[0]).shape == (1, 77, 64)


async def test_calls_that_arrive_together_share_a_batch(start: Start) -> None:
    encoder = await start(batch_wait_seconds=0.2, max_batch_prompts=6)
    await asyncio.gather(*(encoder.encode(f"prompt {number}", "") for number in range(3)))
    assert encoder.metric("safelight_batch_size_count", stage="encoder") == 1
    assert encoder.metric("safelight_batch_size_sum", stage="encoder") == 6


async def test_a_prompt_seen_before_comes_from_the_cache_with_the_same_bits(start: Start) -> None:
    encoder = await start()
    first, second = [(await encoder.encode("a cat")).prompts[0] for _ in range(2)]
    assert (first.cached, second.cached) == (False, True)
    assert torch.equal(embeds(first), embeds(second))
    assert encoder.metric("safelight_cache_hits_total", cache="embeddings") == 1


async def test_an_exact_prompt_equals_its_solo_run_bit_for_bit_in_any_company(start: Start) -> None:
    here, there = await start(cache_bytes=0), await start(batch_wait_seconds=0.1)
    solo = (await here.encode("a cat", exact=True)).prompts[0]
    company = [there.encode(f"prompt {number}", "a cat", exact=False) for number in range(3)]
    ours, *_ = await asyncio.gather(there.encode("a cat", "a cat", "a dog", exact=True), *company)
    for prompt in ours.prompts[:2]:
        assert torch.equal(embeds(prompt), embeds(solo))
    # Three of the exact class by themselves, the others together.
    assert there.metric("safelight_batch_size_count", stage="encoder") == 3 + 1


async def test_an_exact_prompt_never_comes_from_a_batch_by_way_of_the_cache(start: Start) -> None:
    encoder = await start()
    await encoder.encode("a cat", "a dog")
    first, second = [(await encoder.encode("a cat", exact=True)).prompts[0].cached for _ in range(2)]
    assert (first, second) == (False, True)


async def test_a_request_planned_with_other_weights_is_refused(start: Start) -> None:
    context = WorkContext(fingerprints={"encoder": "another"})
    request = EncodeRequest(context=context, model="tiny", prompts=["a cat"])
    assert isinstance(await (await start()).failure(request), FingerprintMismatchError)


async def test_a_prompt_beyond_the_context_is_cut_and_the_cut_is_reported(start: Start) -> None:
    prompt = (await (await start()).encode(LONG_PROMPT)).prompts[0]
    assert prompt.token_count == 2 + 200 + 2
    assert prompt.truncated_text.endswith("long prompt")
    assert LONG_PROMPT.endswith(prompt.truncated_text)


async def test_clip_skip_changes_the_conditioning(start: Start) -> None:
    encoder = await start()
    last, skipped = [(await encoder.encode("a cat", clip_skip=skip)).prompts[0] for skip in (1, 2)]
    assert not torch.equal(embeds(last), embeds(skipped))


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (EncodeRequest(model="tiny"), InvalidRequestError, "prompts"),
        (EncodeRequest(model="tiny", prompts=["a"] * 65), InvalidRequestError, "prompts"),
        (EncodeRequest(model="tiny", prompts=["a"], clip_skip=4), InvalidRequestError, "clip_skip"),
        (EncodeRequest(model="tiny", prompts=["a"], negative_prompts=2), InvalidRequestError, "negative_prompts"),
        (EncodeRequest(model="tiny", prompts=["a", "x" * 70_000]), InvalidRequestError, "prompts[1]"),
        (EncodeRequest(model="tiny", prompts=["a"], determinism=9), InvalidRequestError, "determinism"),  # type: ignore[arg-type]  # as a later client might send
        (EncodeRequest(model="nothing", prompts=["a"]), UnknownModelError, "nothing"),
        (EncodeRequest(model="tiny", prompts=["a"], inputs=[MediaInput()]), UnsupportedError, "inputs"),
    ],
)
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    start: Start, request_: EncodeRequest, kind: type[Exception], field: str
) -> None:
    encoder = await start()
    error = await encoder.failure(request_)
    assert isinstance(error, kind)
    assert field in str(error)
    assert (await encoder.encode("a cat")).prompts
