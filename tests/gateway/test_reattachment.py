"""A client that has lost its connection goes on where it was; the stages never hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
import pytest

from safelight.errors import RequestCancelledError, from_rpc_error
from safelight.v1 import work_pb2 as work
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.generation_service_pb2 import CancelRequest, GenerateRequest, GenerateResponse
from tests.gateway.conftest import Deploy
from tests.support.fake_stages import FakeDenoiser, rest, step

CONTEXT = work.WorkContext(idempotency_key="mine", tenant="me")


def request(after: int = 0) -> GenerateRequest:
    return GenerateRequest(prompt="a cat", context=CONTEXT, after_sequence=after)


class Gate:
    """A denoiser that goes on after its third step when it is let."""

    def __init__(self) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def __call__(self, asked: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        for number in (1, 2, 3):
            yield step(number)
        self.reached.set()
        await self.open.wait()
        async for response in rest(asked):
            if response.progress.step not in (1, 2, 3):
                yield response


async def test_a_client_that_lost_its_connection_misses_no_event_and_gets_none_twice(deploy: Deploy) -> None:
    gate = Gate()
    fake = FakeDenoiser(gate)
    deployment = await deploy([fake])
    seen: list[GenerateResponse] = []
    call = deployment.stub.Generate(request())
    while len(seen) < 4:
        response = await call.read()
        assert isinstance(response, GenerateResponse)
        seen.append(response)
    call.cancel()
    await gate.reached.wait()
    gate.open.set()
    seen += await deployment.events(request(after=4))
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert [event.progress.step for event in seen if event.progress.stage == "denoiser"] == list(range(1, 11))
    assert seen == await deployment.events(request())
    assert len(fake.requests) == 1


async def test_the_same_key_twice_at_once_runs_once(deploy: Deploy) -> None:
    fake = FakeDenoiser(rest)
    deployment = await deploy([fake])
    first, second = await asyncio.gather(deployment.events(request()), deployment.events(request()))
    assert first == second
    assert len(fake.requests) == 1


async def test_cancel_stops_the_work_and_ends_every_call_with_its_reason(deploy: Deploy) -> None:
    gate = Gate()
    fake = FakeDenoiser(gate)
    deployment = await deploy([fake])
    calls = [asyncio.create_task(deployment.events(request())) for _ in range(2)]
    await gate.reached.wait()
    await deployment.stub.Cancel(CancelRequest(context=CONTEXT))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert isinstance(from_rpc_error(caught.value), RequestCancelledError)
    while not fake.cancelled:  # noqa: ASYNC110  only the fake tells
        await asyncio.sleep(0.005)
    await deployment.stub.Cancel(CancelRequest(context=CONTEXT))


async def test_work_that_nobody_comes_back_for_is_stopped(deploy: Deploy) -> None:
    gate = Gate()
    fake = FakeDenoiser(gate)
    deployment = await deploy([fake], reattach_seconds=0.05)
    call = deployment.stub.Generate(request())
    await gate.reached.wait()
    call.cancel()
    while not fake.cancelled:  # noqa: ASYNC110  only the fake tells
        await asyncio.sleep(0.005)
