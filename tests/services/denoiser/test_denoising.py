"""The denoiser through its real server: results, sharing, cancellation, bounds and bad input."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from safelight.errors import InvalidRequestError, NonFiniteError, OverloadedError, TensorCorruptError, from_rpc_error
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from services.common.exchange import BytesPayload
from services.common.server import Server
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from services.modeling.wire import to_tensor
from tests.serving import StartStage
from tests.support.stage_requests import conditioning, denoise_request, inline


class Denoiser:
    """A running denoiser, and calls to it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.stub = DenoiserServiceStub(channel)

    async def events(self, request: DenoiseRequest) -> list[DenoiseResponse]:
        return [event async for event in self.stub.Denoise(request, timeout=60)]

    async def latents(self, request: DenoiseRequest) -> Tensor:
        ref = (await self.events(request))[-1].result.latents
        return to_tensor(ref.header, BytesPayload(ref.inline))

    async def failure(self, request: DenoiseRequest) -> Exception:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.events(request)
        return from_rpc_error(caught.value)

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


Start = Callable[..., Awaitable[Denoiser]]


@pytest.fixture
def start(start_stage: StartStage, tiny_manifest: str) -> Start:
    async def start_denoiser(**settings: Any) -> Denoiser:
        running = await start_stage(DenoiserSettings(manifest=tiny_manifest, device="cpu", **settings), build_denoiser)
        return Denoiser(running.server, running.channel)

    return start_denoiser


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


async def test_a_request_streams_its_place_every_step_and_the_latent(start: Start) -> None:
    events = await (await start()).events(denoise_request(steps=3))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["queued", "progress", "progress", "progress", "result"]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert events[-1].result.steps_run == 3


async def test_the_same_request_gives_the_same_bits(start: Start) -> None:
    denoiser = await start()
    first, second = [await denoiser.latents(denoise_request(seed=5)) for _ in range(2)]
    assert torch.equal(first, second)


@pytest.mark.parametrize("batch_cfg", [True, False])
async def test_mixed_requests_share_batches_and_equal_their_solo_runs(start: Start, batch_cfg: bool) -> None:
    denoiser = await start(batch_cfg=batch_cfg)
    mix = [("euler", 4, 5.0), ("euler_ancestral", 7, 3.0), ("ddim", 5, 1.0), ("dpmpp_2m", 9, 7.5)]
    requests = [
        denoise_request(seed=seed, sampler=sampler, steps=steps, scale=scale)
        for seed, (sampler, steps, scale) in enumerate(mix)
    ]
    alone = [await denoiser.latents(request) for request in requests]
    batches_alone = denoiser.metric("safelight_batch_size_count", stage="denoiser")
    together = await asyncio.gather(*(denoiser.latents(request) for request in requests))
    batches_together = denoiser.metric("safelight_batch_size_count", stage="denoiser") - batches_alone
    errors = [relative_error(shared, solo) for shared, solo in zip(together, alone, strict=True)]
    assert max(errors) < 1e-4
    assert batches_together < batches_alone


async def test_without_batched_cfg_the_latent_is_the_same(start: Start) -> None:
    batched, in_turn = await start(batch_cfg=True), await start(batch_cfg=False)
    request = denoise_request(seed=3, steps=6)
    assert relative_error(await batched.latents(request), await in_turn.latents(request)) < 1e-4


async def test_a_cancelled_request_stops_within_one_step(start: Start) -> None:
    denoiser = await start()
    call = denoiser.stub.Denoise(denoise_request(steps=1000))
    async for event in call:
        if event.progress.step == 3:
            call.cancel()
            break
    while denoiser.metric("safelight_running", stage="denoiser"):  # noqa: ASYNC110  only the metric tells
        await asyncio.sleep(0.001)
    steps_when_gone = denoiser.metric("safelight_denoise_steps_total", model="tiny")
    await denoiser.latents(denoise_request(steps=2))
    # The step that was running when the call was cancelled may end; no other is computed for it.
    assert denoiser.metric("safelight_denoise_steps_total", model="tiny") <= steps_when_gone + 1 + 2 < 100


async def test_a_deadline_in_the_request_stops_it_before_its_last_step(start: Start) -> None:
    denoiser = await start()
    request = denoise_request(steps=1000)
    request.context.deadline.FromNanoseconds(int((time.time() + 0.2) * 1e9))
    error = await denoiser.failure(request)
    assert type(error).__name__ == "DeadlineExceededError"
    assert 0 < denoiser.metric("safelight_denoise_steps_total", model="tiny") < 1000


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(start: Start) -> None:
    denoiser = await start(max_running=1, queue_capacity=1)
    calls = [denoiser.stub.Denoise(denoise_request(steps=1000)) for _ in range(2)]
    for call in calls:
        await call.read()
    error = await denoiser.failure(denoise_request())
    for call in calls:
        call.cancel()
    assert isinstance(error, OverloadedError)
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0


def lying_shape(request: DenoiseRequest) -> None:
    request.conditioning.tensors[0].tensor.header.shape[1] = 1000


def truncated_tensor(request: DenoiseRequest) -> None:
    ref = request.conditioning.tensors[0].tensor
    ref.inline = ref.inline[:-3]


def nan_conditioning(request: DenoiseRequest) -> None:
    embeds = torch.full((1, 8, 64), float("nan"))
    request.conditioning.tensors[0].tensor.CopyFrom(inline(embeds))


def wrong_width(request: DenoiseRequest) -> None:
    request.conditioning.tensors[0].tensor.CopyFrom(inline(torch.zeros(1, 8, 63)))


def unlike_negative(request: DenoiseRequest) -> None:
    request.negative_conditioning.CopyFrom(conditioning(1, tokens=9))


def unknown_sampler(request: DenoiseRequest) -> None:
    request.sampling.sampler = "magic"


def unknown_parameter(request: DenoiseRequest) -> None:
    request.sampling.sampler_parameters["churn"] = 1.0


def negative_steps(request: DenoiseRequest) -> None:
    request.sampling.steps = -1


def no_channels(request: DenoiseRequest) -> None:
    del request.latent_shape[:]


def negative_seed(request: DenoiseRequest) -> None:
    request.seed = -1


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (lying_shape, TensorCorruptError, "conditioning.prompt_embeds"),
        (truncated_tensor, TensorCorruptError, "conditioning.prompt_embeds"),
        (nan_conditioning, NonFiniteError, "conditioning.prompt_embeds"),
        (wrong_width, InvalidRequestError, "conditioning.prompt_embeds"),
        (unlike_negative, InvalidRequestError, "negative_conditioning"),
        (unknown_sampler, InvalidRequestError, "sampling"),
        (unknown_parameter, InvalidRequestError, "sampling"),
        (negative_steps, InvalidRequestError, "sampling.steps"),
        (no_channels, InvalidRequestError, "latent_shape"),
        (negative_seed, InvalidRequestError, "seed"),
    ],
)
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    start: Start, spoil: Any, kind: type[Exception], field: str
) -> None:
    denoiser = await start()
    request = denoise_request()
    spoil(request)
    error = await denoiser.failure(request)
    assert isinstance(error, kind)
    assert field in str(error)
    assert (await denoiser.latents(denoise_request())).isfinite().all()
