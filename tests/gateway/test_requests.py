"""A request with a key runs once, whoever asks for it and however often; without one it ends with its call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from gateway.requests import Requests
from gateway.settings import GatewaySettings
from safelight.errors import (
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
    RequestCancelledError,
    StageUnavailableError,
)
from safelight.v1.generation_service_pb2 import GenerateAccepted, GenerateRequest, GenerateResponse, GenerateResult
from safelight.v1.work_pb2 import FileChunk, SamplingOptions, WorkContext
from services.common.metrics import Metrics

Emit = Callable[[GenerateResponse], None]
Work = Callable[[GenerateRequest, Emit], Awaitable[None]]
SETTINGS = GatewaySettings(reattach_seconds=60.0, journal_seconds=60.0)


class CountingGeneration:
    """Counts what is started and what is cancelled; the work itself is the test's."""

    def __init__(self, work: Work) -> None:
        self.requests: list[GenerateRequest] = []
        self.remaining: list[float | None] = []
        self.cancelled = 0
        self._work = work

    async def run(self, request: GenerateRequest, remaining_seconds: float | None, emit: Emit) -> None:
        self.requests.append(request)
        self.remaining.append(remaining_seconds)
        try:
            await self._work(request, emit)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def requests_of(work: Work, settings: GatewaySettings = SETTINGS) -> tuple[Requests, CountingGeneration]:
    generation = CountingGeneration(work)
    return Requests(generation.run, settings, Metrics()), generation


async def draw(request: GenerateRequest, emit: Emit) -> None:
    """A request of three events."""
    emit(GenerateResponse(accepted=GenerateAccepted(request_id=request.context.request_id)))
    await asyncio.sleep(0)
    emit(GenerateResponse(chunk=FileChunk(data=b"picture")))
    emit(GenerateResponse(result=GenerateResult()))


async def draw_for_ever(request: GenerateRequest, emit: Emit) -> None:
    emit(GenerateResponse(accepted=GenerateAccepted()))
    await asyncio.Event().wait()


def asked(key: str = "k", after: int = 0, tenant: str = "", request_id: str = "") -> GenerateRequest:
    return GenerateRequest(
        prompt="a cat",
        sampling=SamplingOptions(sampler_parameters={"eta": 0.5, "s_noise": 1.0}),
        context=WorkContext(idempotency_key=key, tenant=tenant, request_id=request_id),
        after_sequence=after,
    )


async def numbers(requests: Requests, request: GenerateRequest) -> list[int]:
    return [event.sequence async for event in requests.attach(request, None)]


async def begin(requests: Requests, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
    """A call that has got its first event."""
    call = requests.attach(request, None)
    await anext(call)
    return call


async def settled(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  what the loop does by itself has no event
        await asyncio.sleep(0)


async def test_two_calls_of_one_key_at_once_run_once_and_get_the_same() -> None:
    requests, generation = requests_of(draw)
    calls = await asyncio.gather(*(numbers(requests, asked()) for _ in range(5)))
    assert calls == [[1, 2, 3]] * 5
    assert len(generation.requests) == 1


async def test_a_repeated_call_gets_the_first_result_also_after_its_end() -> None:
    requests, generation = requests_of(draw)
    assert await numbers(requests, asked()) == [1, 2, 3]
    assert await numbers(requests, asked(request_id="another name")) == [1, 2, 3]
    assert await numbers(requests, asked(after=2)) == [3]
    assert len(generation.requests) == 1


async def test_the_same_key_with_another_request_is_refused_and_the_first_goes_on() -> None:
    requests, generation = requests_of(draw_for_ever)
    call = await begin(requests, asked())
    other = asked()
    other.prompt = "a dog"
    with pytest.raises(InvalidRequestError) as caught:
        await numbers(requests, other)
    assert [violation.field for violation in caught.value.violations] == ["context.idempotency_key"]
    assert generation.cancelled == 0
    await call.aclose()
    await requests.close()


async def test_tenants_have_keys_of_their_own() -> None:
    requests, generation = requests_of(draw)
    await asyncio.gather(numbers(requests, asked(tenant="a")), numbers(requests, asked(tenant="b")))
    assert len(generation.requests) == 2


async def test_a_request_without_a_key_ends_with_its_call() -> None:
    requests, generation = requests_of(draw_for_ever)
    call = await begin(requests, asked(key=""))
    await call.aclose()
    await settled(lambda: generation.cancelled == 1)
    assert requests.metrics.registry.get_sample_value("safelight_journal_bytes") == 0


async def test_requests_without_a_key_are_never_the_same() -> None:
    requests, generation = requests_of(draw)
    await asyncio.gather(numbers(requests, asked(key="")), numbers(requests, asked(key="")))
    assert len(generation.requests) == 2


async def test_lost_calls_come_back_to_running_work_and_miss_no_event() -> None:
    more = asyncio.Event()

    async def in_two_parts(request: GenerateRequest, emit: Emit) -> None:
        emit(GenerateResponse(accepted=GenerateAccepted()))
        emit(GenerateResponse(chunk=FileChunk(data=b"1")))
        await more.wait()
        await draw(request, emit)

    requests, generation = requests_of(in_two_parts)
    lost = await begin(requests, asked())
    await lost.aclose()
    more.set()
    assert await numbers(requests, asked(after=1)) == [2, 3, 4, 5]
    assert (len(generation.requests), generation.cancelled) == (1, 0)


async def test_work_that_nobody_comes_back_for_is_cancelled_and_its_key_is_free() -> None:
    requests, generation = requests_of(draw_for_ever, GatewaySettings(reattach_seconds=0.01))
    call = await begin(requests, asked())
    await call.aclose()
    while not generation.cancelled:  # noqa: ASYNC110  the timer is the law
        await asyncio.sleep(0.005)
    again = await begin(requests, asked())
    assert len(generation.requests) == 2
    await again.aclose()
    await requests.close()


@pytest.mark.parametrize(
    "named", [WorkContext(idempotency_key="k", tenant="a"), WorkContext(request_id="mine", tenant="a")]
)
async def test_cancel_ends_the_work_and_every_call_of_it(named: WorkContext) -> None:
    requests, generation = requests_of(draw_for_ever)
    calls = [await begin(requests, asked(tenant="a", request_id="mine")) for _ in range(2)]
    requests.cancel(WorkContext(idempotency_key="k"))  # another tenant's
    requests.cancel(named)
    for call in calls:
        with pytest.raises(RequestCancelledError):
            await anext(call)
    requests.cancel(named)
    assert (len(generation.requests), generation.cancelled) == (1, 1)


async def test_a_request_that_is_cancelled_before_its_first_step_ends_its_calls_too() -> None:
    requests, generation = requests_of(draw)
    call = asyncio.create_task(numbers(requests, asked()))
    await settled(lambda: bool(requests._by_key))
    requests.cancel(WorkContext(idempotency_key="k"))
    with pytest.raises(RequestCancelledError):
        await call
    assert generation.requests == []


async def test_a_cancel_must_name_a_request() -> None:
    requests, _ = requests_of(draw)
    with pytest.raises(InvalidRequestError, match="idempotency_key or its request_id"):
        requests.cancel(WorkContext(tenant="a"))


async def test_an_error_that_would_come_again_is_the_result_of_its_key() -> None:
    async def fail(request: GenerateRequest, emit: Emit) -> None:
        emit(GenerateResponse(accepted=GenerateAccepted()))
        raise NonFiniteError("latents: not finite")

    requests, generation = requests_of(fail)
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            await numbers(requests, asked())
    assert len(generation.requests) == 1


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("error", [OverloadedError("full"), StageUnavailableError("gone")])
async def test_an_error_that_another_try_could_avoid_frees_the_key(error: Exception, accepted: bool) -> None:
    async def fail(request: GenerateRequest, emit: Emit) -> None:
        if accepted:
            emit(GenerateResponse(accepted=GenerateAccepted()))
        raise error

    requests, generation = requests_of(fail)
    for _ in range(2):
        with pytest.raises(type(error)):
            await numbers(requests, asked())
    assert len(generation.requests) == 2


async def test_a_refusal_before_anything_was_started_frees_the_key() -> None:
    async def refuse(request: GenerateRequest, emit: Emit) -> None:
        raise InvalidRequestError.of("width", "is 7")

    requests, generation = requests_of(refuse)
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            await numbers(requests, asked())
    assert len(generation.requests) == 2


async def test_a_result_is_kept_for_a_while_and_then_forgotten() -> None:
    requests, generation = requests_of(draw, GatewaySettings(journal_seconds=0.01))
    await numbers(requests, asked())
    kept = requests.metrics.registry.get_sample_value("safelight_journal_bytes")
    while requests.metrics.registry.get_sample_value("safelight_journal_bytes"):  # noqa: ASYNC110  the timer is the law
        await asyncio.sleep(0.005)
    assert await numbers(requests, asked(after=2)) == [1, 2, 3]
    assert kept
    assert len(generation.requests) == 2


async def test_the_oldest_results_make_room_for_newer_ones() -> None:
    async def draw_large(request: GenerateRequest, emit: Emit) -> None:
        emit(GenerateResponse(chunk=FileChunk(data=bytes(1000))))

    requests, generation = requests_of(draw_large, GatewaySettings(journal_bytes=2500))
    for key in ("1", "2", "3"):
        await numbers(requests, asked(key))
    await asyncio.gather(numbers(requests, asked("3")), numbers(requests, asked("2")))
    assert len(generation.requests) == 3
    await numbers(requests, asked("1"))
    assert len(generation.requests) == 4


async def test_results_that_are_read_too_slowly_are_bounded_the_newest_is_not_dropped() -> None:
    async def draw_large(request: GenerateRequest, emit: Emit) -> None:
        for _ in range(3):
            emit(GenerateResponse(chunk=FileChunk(data=bytes(1000))))

    requests, _ = requests_of(draw_large, GatewaySettings(journal_bytes=2500))
    slow = [await begin(requests, asked(key="")) for _ in range(4)]
    await settled(lambda: not requests._running)
    kept = requests.metrics.registry.get_sample_value("safelight_journal_bytes")
    assert kept is not None
    assert 2000 <= kept <= 2500
    with pytest.raises(OverloadedError, match="not read in time"):
        await anext(slow[0])
    assert [event.sequence async for event in slow[-1]] == [2, 3]


async def test_the_deadline_of_a_call_bounds_a_request_without_a_key_only() -> None:
    requests, generation = requests_of(draw)
    for key in ("", "k"):
        async for _ in requests.attach(asked(key), 7.0):
            pass
    assert generation.remaining == [7.0, None]


@pytest.mark.parametrize(("request_", "remedy"), [(asked(after=-1), "0 or more"), (asked("", 3), "idempotency_key")])
async def test_a_wrong_after_sequence_is_named_with_its_remedy(request_: GenerateRequest, remedy: str) -> None:
    requests, _ = requests_of(draw)
    with pytest.raises(InvalidRequestError, match=remedy) as caught:
        await numbers(requests, request_)
    assert caught.value.violations[0].field == "after_sequence"


async def test_a_key_is_of_bounded_length() -> None:
    requests, _ = requests_of(draw)
    with pytest.raises(InvalidRequestError, match="at most 256") as caught:
        await numbers(requests, asked("k" * 257))
    assert caught.value.violations[0].field == "context.idempotency_key"
    assert await numbers(requests, asked("k" * 256)) == [1, 2, 3]


async def test_the_work_gets_a_request_id_when_the_client_gives_none() -> None:
    requests, generation = requests_of(draw)
    await numbers(requests, asked())
    assert generation.requests[0].context.request_id
