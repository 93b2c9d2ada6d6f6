"""Laws of heartbeats: a stream is never silent for long, and is otherwise as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from safelight.errors import StageDrainingError
from safelight.v1.denoiser_service_pb2 import DenoiseProgress, DenoiseResponse
from services.denoiser.heartbeat import with_heartbeats
from tests.support.running_denoiser import StartDenoiser
from tests.support.stage_requests import denoise_request

SHORT, LONG = 0.005, 60.0


def progress(step: int) -> DenoiseResponse:
    return DenoiseResponse(progress=DenoiseProgress(step=step))


async def test_events_that_come_in_time_pass_in_order_and_alone() -> None:
    async def events() -> AsyncGenerator[DenoiseResponse, None]:
        for step in range(5):
            yield progress(step)

    seen = [event async for event in with_heartbeats(events(), LONG)]
    assert seen == [progress(step) for step in range(5)]


async def test_a_silence_is_broken_again_and_again_until_the_next_event() -> None:
    go_on = asyncio.Event()

    async def events() -> AsyncGenerator[DenoiseResponse, None]:
        yield progress(1)
        await go_on.wait()
        yield progress(2)

    seen = []
    async for event in with_heartbeats(events(), SHORT):
        seen.append(event)
        if len(seen) == 4:
            go_on.set()
    steps = [event for event in seen if not event.HasField("heartbeat")]
    assert steps == [progress(1), progress(2)]
    assert all(event.heartbeat.time.seconds > 0 for event in seen[1:4])


async def test_what_ends_the_events_ends_the_stream() -> None:
    async def events() -> AsyncGenerator[DenoiseResponse, None]:
        yield progress(1)
        raise StageDrainingError("stopping")

    with pytest.raises(StageDrainingError):
        async for _ in with_heartbeats(events(), SHORT):
            pass


async def test_closing_the_stream_ends_what_the_events_were_waiting_for() -> None:
    ended = asyncio.Event()

    async def events() -> AsyncGenerator[DenoiseResponse, None]:
        try:
            await asyncio.Event().wait()
            yield progress(1)
        finally:
            ended.set()

    stream = with_heartbeats(events(), SHORT)
    assert (await anext(stream)).HasField("heartbeat")
    await stream.aclose()
    assert ended.is_set()


async def test_a_denoiser_gives_signs_of_life_while_it_computes(start: StartDenoiser) -> None:
    denoiser = await start(heartbeat_seconds=0.001)
    events = await denoiser.events(denoise_request(steps=20))
    assert any(event.HasField("heartbeat") for event in events)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_a_denoiser_gives_signs_of_life_while_a_request_waits_for_its_turn(start: StartDenoiser) -> None:
    denoiser = await start(heartbeat_seconds=0.001, max_running=1)
    running = denoiser.stub.Denoise(denoise_request(steps=1000))
    await running.read()
    waiting = denoiser.stub.Denoise(denoise_request(seed=1))
    async for event in waiting:  # ends with its first heartbeat, or never
        if event.HasField("heartbeat"):
            break
    for call in (running, waiting):
        call.cancel()
    assert event.HasField("heartbeat")
