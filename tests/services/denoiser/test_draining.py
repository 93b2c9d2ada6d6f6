"""Laws of a denoiser that stops: requests leave at the next step, with what is needed to go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import torch

from safelight.errors import SafelightError, StageDrainingError, from_rpc_error
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.load_service_pb2 import GetLoadRequest
from safelight.v1.load_service_pb2_grpc import LoadServiceStub
from safelight.v1.tensor_exchange_service_pb2 import PullRequest, ReleaseRequest
from safelight.v1.tensor_exchange_service_pb2_grpc import TensorExchangeServiceStub
from services.common.channels import open_channel
from services.common.server import Server
from services.common.stage import make_surroundings
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser, checkpoints_of, latents_of
from tests.support.stage_requests import denoise_request, exact, resumed, with_checkpoints


@asynccontextmanager
async def draining_denoiser(manifest: str, **settings: Any) -> AsyncIterator[RunningDenoiser]:
    """A denoiser with time to drain; the test stops it."""
    chosen = DenoiserSettings(manifest=manifest, device="cpu", warm_up_steps=0, drain_seconds=60.0, **settings)
    surroundings = make_surroundings(chosen)
    server = Server(build_denoiser(chosen, surroundings), chosen, surroundings.metrics)
    await server.start()
    async with open_channel(server.address) as channel:
        yield RunningDenoiser(server, channel)


async def until_step(call: grpc.aio.UnaryStreamCall[DenoiseRequest, DenoiseResponse], step: int) -> None:
    """Returns when the step is done, or with the first event for step 0."""
    async for event in call:
        if event.progress.step >= step:
            return


async def rest(
    call: grpc.aio.UnaryStreamCall[DenoiseRequest, DenoiseResponse],
) -> tuple[list[DenoiseResponse], SafelightError]:
    """The events until the call fails, and what it fails with."""
    events = []
    try:
        async for event in call:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return events, from_rpc_error(error)
    raise AssertionError("the call did not fail")


async def test_a_running_request_leaves_with_a_checkpoint_and_goes_on_elsewhere_bit_for_bit(
    start: StartDenoiser, tiny_manifest: str
) -> None:
    request = exact(denoise_request(steps=30, sampler="euler_ancestral"))
    elsewhere = await start()
    async with draining_denoiser(tiny_manifest) as denoiser:
        call = denoiser.stub.Denoise(with_checkpoints(request, every_steps=300))
        await until_step(call, 3)
        stopping = asyncio.create_task(denoiser.server.stop())
        events, error = await rest(call)
        await stopping
    assert type(error) is StageDrainingError
    assert error.metadata == {"stage": "denoiser"}
    (point,) = checkpoints_of(events)
    assert events[-1].HasField("checkpoint")
    assert 3 <= point.step == denoiser.steps() < 30
    gone_on = await elsewhere.events(resumed(request, point))
    assert gone_on[-1].result.steps_run == 30 - point.step
    assert torch.equal(latents_of(gone_on), await elsewhere.latents(request))


async def test_a_waiting_request_leaves_without_a_step_and_a_checkpoint(tiny_manifest: str) -> None:
    request = exact(denoise_request(steps=1000))  # shares no pass, and is not overdue before all this is over
    first = with_checkpoints(request, every_steps=1)
    first.context.priority = 100
    async with draining_denoiser(tiny_manifest) as denoiser:
        running = denoiser.stub.Denoise(first)
        await until_step(running, 2)
        waiting = denoiser.stub.Denoise(with_checkpoints(request, every_steps=1))
        await until_step(waiting, 0)
        stopping = asyncio.create_task(denoiser.server.stop())
        (events, error), (_, other) = await asyncio.gather(rest(waiting), rest(running))
        await stopping
    assert checkpoints_of(events) == []
    assert (type(error), type(other)) == (StageDrainingError, StageDrainingError)


async def test_a_draining_denoiser_refuses_new_requests_says_so_and_hands_out_what_it_holds(tiny_manifest: str) -> None:
    async with draining_denoiser(tiny_manifest) as denoiser:
        request = denoise_request(steps=30, scale=1.0, sampler="dpmpp_2m")
        request.latent_shape[:] = [4, 48, 48]  # with its history too large to travel inline
        call = denoiser.stub.Denoise(with_checkpoints(request, every_steps=300))
        await until_step(call, 2)
        stopping = asyncio.create_task(denoiser.server.stop())
        events, _ = await rest(call)
        ref = checkpoints_of(events)[0].sampler_state
        assert type(await denoiser.failure(denoise_request())) is StageDrainingError
        assert (await LoadServiceStub(denoiser.channel).GetLoad(GetLoadRequest())).draining
        exchange = TensorExchangeServiceStub(denoiser.channel)
        pulled = b"".join([chunk.data async for chunk in exchange.Pull(PullRequest(ticket=ref.lease.ticket))])
        assert len(pulled) == ref.header.shape[0]
        assert not stopping.done()
        await exchange.Release(ReleaseRequest(tickets=[ref.lease.ticket]))
        await asyncio.wait_for(stopping, 30)
