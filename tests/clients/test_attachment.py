"""A request survives a busy gateway and a broken connection: no event missed, none twice, and no work left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import grpc
import pytest

from safelight import (
    Accepted,
    AsyncClient,
    DeadlineExceededError,
    Event,
    GenerationOptions,
    GenerationResult,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    Progress,
    RequestCancelledError,
    RetryPolicy,
    StageUnavailableError,
)
from safelight.attachment import Attachment
from safelight.event_reader import EventReader
from safelight.link import Link
from safelight.messages import to_request
from safelight.retry import Retries
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2 as work
from services.common.request_context import Context
from tests.clients.gateways import Answer, FakeGateway, cut, refuses, serving, stays_after, story, tells

CAT = GenerationOptions(prompt="a cat", tenant="studio")
BUSY = OverloadedError("full", retry_after_seconds=0.01)
QUICK = RetryPolicy(first_wait_seconds=0.01, reconnect_seconds=10.0)
WHOLE = story()
TOLD = [event for event in map(EventReader().read, WHOLE) if event is not None]
LOST = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]


async def events_of(endpoint: str, retry: RetryPolicy = QUICK) -> list[Event]:
    async with AsyncClient(endpoint, retry=retry) as client:
        return [event async for event in client.stream(CAT)]


async def test_a_busy_gateway_is_asked_again_and_no_sooner_than_it_said() -> None:
    busy = OverloadedError("full", retry_after_seconds=2.0)
    gateway = FakeGateway(refuses(busy), refuses(busy), tells(WHOLE))
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with serving(gateway) as endpoint:
        link = Link(endpoint)
        tries = Retries(RetryPolicy(first_wait_seconds=0.5), draw=lambda: 0.5)
        attachment = Attachment(link, to_request(CAT, idempotency_key="k"), tries, sleep)
        events = [event async for event in attachment.events()]
        await link.close()
    assert events == TOLD
    assert waits == [2.25, 2.5]


async def test_a_gateway_that_stays_busy_is_an_overload_in_the_end() -> None:
    gateway = FakeGateway(refuses(BUSY))
    async with serving(gateway) as endpoint:
        with pytest.raises(OverloadedError):
            await events_of(endpoint, RetryPolicy(max_attempts=3, first_wait_seconds=0.01))
    assert len(gateway.requests) == 3


@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("after", range(1, len(WHOLE)))
async def test_a_broken_connection_is_taken_up_where_it_was(after: int, code: grpc.StatusCode) -> None:
    gateway = FakeGateway(cut(WHOLE, after, code), tells(WHOLE))
    async with serving(gateway) as endpoint:
        assert await events_of(endpoint) == TOLD
    assert [request.after_sequence for request in gateway.requests] == [0, after]
    assert len({request.context.idempotency_key for request in gateway.requests}) == 1


async def test_a_connection_that_breaks_after_every_event_costs_none() -> None:
    gateway = FakeGateway(*(cut(WHOLE, after, LOST[0]) for after in range(1, len(WHOLE))), tells(WHOLE))
    async with serving(gateway) as endpoint:
        assert await events_of(endpoint) == TOLD
    assert len(gateway.requests) == len(WHOLE)


async def test_a_connection_that_breaks_after_the_result_is_of_no_consequence() -> None:
    gateway = FakeGateway(cut(WHOLE, len(WHOLE), LOST[0]))
    async with serving(gateway) as endpoint:
        assert await events_of(endpoint) == TOLD
    assert (len(gateway.requests), gateway.cancelled) == (1, [])


async def test_a_gateway_that_is_started_again_is_found_again() -> None:
    first, second = FakeGateway(stays_after(WHOLE[:2])), FakeGateway(tells(WHOLE))
    events: list[Event] = []
    async with serving(first) as endpoint:
        client = AsyncClient(endpoint, retry=QUICK)
        stream = client.stream(CAT)
        events += [await anext(stream), await anext(stream)]
    async with client, serving(second, endpoint):
        events += [event async for event in stream]
    assert events == TOLD
    assert second.requests[0].after_sequence == 2


async def test_a_gateway_that_has_forgotten_the_request_tells_all_of_it_anew() -> None:
    other = story(seed=9, file=b"another file")
    gateway = FakeGateway(cut(WHOLE, 5, LOST[0]), lambda request, context: tells(other)(pb.GenerateRequest(), context))
    async with serving(gateway) as endpoint:
        events = await events_of(endpoint)
    assert [event.seeds for event in events if isinstance(event, Accepted)] == [(5,), (9,)]
    assert isinstance(events[-1], GenerationResult)
    assert events[-1].images[0].data == b"another file"


async def test_a_request_that_brings_every_gateway_down_is_given_up() -> None:
    gateway = FakeGateway(lambda request, context: cut(WHOLE, 2, LOST[0])(pb.GenerateRequest(), context))
    async with serving(gateway) as endpoint:
        with pytest.raises(StageUnavailableError):
            await events_of(endpoint, RetryPolicy(max_attempts=3, reconnect_seconds=10.0))
    assert len(gateway.requests) == 4


async def test_an_event_that_is_missing_is_an_error() -> None:
    async with serving(FakeGateway(tells([*WHOLE[:2], *WHOLE[3:]]))) as endpoint:
        with pytest.raises(InternalError, match="event 4 came after event 2"):
            await events_of(endpoint)


async def test_an_endpoint_that_has_never_answered_is_told_at_once() -> None:
    async with serving(FakeGateway(tells(WHOLE))) as endpoint:
        pass
    with pytest.raises(StageUnavailableError, match="no gateway answers"):
        await asyncio.wait_for(events_of(endpoint, RetryPolicy(reconnect_seconds=1000.0)), 30)


async def test_a_gateway_that_does_not_come_back_is_an_error_with_a_remedy() -> None:
    async with serving(FakeGateway(tells(WHOLE))) as endpoint:
        client = AsyncClient(endpoint, retry=RetryPolicy(reconnect_seconds=0.3))
        await client.generate("a cat")
    async with client:
        with pytest.raises(StageUnavailableError, match=r"no gateway answers at 127\.0\.0\.1:.*\(safelight up\)"):
            await client.generate("a cat")


async def test_leaving_the_stream_stops_the_work() -> None:
    gateway = FakeGateway(stays_after(WHOLE[:2]))
    async with serving(gateway) as endpoint, AsyncClient(endpoint) as client:
        async with aclosing(client.stream(CAT, idempotency_key="mine")) as events:
            async for event in events:
                if isinstance(event, Progress):
                    break
        assert gateway.cancelled == [work.WorkContext(tenant="studio", idempotency_key="mine")]
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_a_cancelled_task_stops_the_work() -> None:
    gateway, began = FakeGateway(stays_after(WHOLE[:2])), asyncio.Event()
    async with serving(gateway) as endpoint, AsyncClient(endpoint) as client:
        task = asyncio.create_task(client.generate("a cat", on_event=lambda event: began.set()))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(gateway.cancelled) == 1


async def test_time_that_is_up_stops_the_work() -> None:
    gateway = FakeGateway(stays_after(WHOLE[:2]))
    async with serving(gateway) as endpoint, AsyncClient(endpoint) as client:
        with pytest.raises(DeadlineExceededError, match="was not done within timeout_seconds"):
            await client.generate("a cat", timeout_seconds=0.3)
    assert len(gateway.cancelled) == 1


async def test_closing_the_client_stops_the_work_of_all_its_calls() -> None:
    gateway = FakeGateway(stays_after(WHOLE[:2]))
    async with serving(gateway) as endpoint:
        client = AsyncClient(endpoint)
        streams = [client.stream(CAT, idempotency_key=key) for key in ("one", "two")]
        for stream in streams:
            await anext(stream)
        await client.close()
        for stream in streams:
            with pytest.raises(asyncio.CancelledError):
                [event async for event in stream]
    assert {context.idempotency_key for context in gateway.cancelled} == {"one", "two"}


async def test_closing_the_client_ends_a_call_that_waits_to_be_sent_again() -> None:
    waiting, slept = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        await slept.wait()

    async with serving(FakeGateway(refuses(BUSY))) as endpoint:
        link = Link(endpoint)
        attachment = Attachment(link, to_request(CAT, idempotency_key="k"), Retries(QUICK), sleep)
        task = asyncio.create_task(anext(attachment.events()))
        await waiting.wait()
        await attachment.close()
        await link.close()
        slept.set()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("answer", [tells(WHOLE), refuses(InvalidRequestError.of("width", "is wrong"))])
async def test_a_request_that_has_ended_is_not_cancelled(answer: Answer) -> None:
    gateway = FakeGateway(answer)
    async with serving(gateway) as endpoint, AsyncClient(endpoint) as client:
        with suppress(InvalidRequestError):
            await client.generate("a cat")
    assert gateway.cancelled == []


async def test_a_gateway_that_does_not_hear_the_cancel_holds_nobody_up() -> None:
    class Deaf(FakeGateway):
        async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
            await asyncio.Event().wait()
            raise AssertionError

    async with serving(Deaf(stays_after(WHOLE[:2]))) as endpoint, AsyncClient(endpoint) as client:
        stream = client.stream(CAT)
        await anext(stream)
        await asyncio.wait_for(stream.aclose(), 20)


async def test_a_request_that_another_client_has_stopped_is_not_made_again() -> None:
    gateway = FakeGateway(refuses(RequestCancelledError("stopped")))
    async with serving(gateway) as endpoint:
        with pytest.raises(RequestCancelledError):
            await events_of(endpoint)
    assert len(gateway.requests) == 1


async def test_the_deadline_travels_and_stays_the_same_when_the_request_is_sent_again() -> None:
    gateway = FakeGateway(cut(WHOLE, 3, LOST[0]), tells(WHOLE))
    async with serving(gateway) as endpoint, AsyncClient(endpoint, retry=QUICK) as client:
        before = time.time()
        await client.generate("a cat", timeout_seconds=100.0)
    first, second = (request.context.deadline.ToNanoseconds() / 1e9 for request in gateway.requests)
    assert before + 99.9 < first == second < time.time() + 100.1


async def test_every_call_has_a_key_of_its_own_or_the_one_it_is_given() -> None:
    gateway = FakeGateway(tells(WHOLE))
    async with serving(gateway) as endpoint, AsyncClient(endpoint) as client:
        for key in (None, None, "mine", "mine"):
            await client.generate("a cat", idempotency_key=key)
        with pytest.raises(InvalidRequestError, match="idempotency_key: is empty"):
            await client.generate("a cat", idempotency_key="")
    first, second, *given = (request.context.idempotency_key for request in gateway.requests)
    assert len({first, second, "", "mine"}) == 4
    assert given == ["mine", "mine"]


async def test_events_that_a_slow_reader_has_not_taken_are_not_lost_with_the_connection() -> None:
    async def answer(request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        for event in WHOLE[request.after_sequence : request.after_sequence + 2]:
            yield event
        if request.after_sequence + 2 < len(WHOLE):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async with serving(FakeGateway(answer)) as endpoint, AsyncClient(endpoint, retry=QUICK) as client:
        events = []
        async for event in client.stream(CAT):
            await asyncio.sleep(0.02)  # the connection is gone before the next event is asked for
            events.append(event)
    assert events == TOLD
