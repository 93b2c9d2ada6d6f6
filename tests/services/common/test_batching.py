"""Laws of batching: calls of equal key share a batch, none waits longer than it must, and one's trouble is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from safelight.errors import OverloadedError
from services.common.batch_costs import WorkKind
from services.common.batching import Batcher, BatchLimits
from services.common.metrics import Metrics

WORDS = WorkKind("sd15")
PATIENT = BatchLimits(max_size=3, max_wait_seconds=60.0, capacity=8)
"""Runs full batches only, within the time of a test."""
EAGER = BatchLimits(max_size=3, max_wait_seconds=0.0, capacity=8)


class Doubler:
    """Doubles items; notes the batches and, when it is closed, holds them up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def run(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.begun.set()
        await self.open.wait()
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


@asynccontextmanager
async def batching(
    doubler: Doubler, limits: BatchLimits, metrics: Metrics | None = None
) -> AsyncIterator[Batcher[int, int]]:
    batcher = Batcher[int, int]("encoder", doubler.run, limits, metrics or Metrics())
    batcher.start()
    yield batcher
    await batcher.close()


async def submitted(batcher: Batcher[int, int], *items: int, key: str = "") -> list[asyncio.Task[int]]:
    """The calls, each of them waiting in the batcher."""

    async def result(item: int) -> int:
        return (await batcher.submit(item, WORDS, key))[0]

    tasks = [asyncio.create_task(result(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def test_calls_that_arrive_together_share_a_batch_and_each_gets_its_result() -> None:
    doubler = Doubler()
    async with batching(doubler, PATIENT) as batcher:
        results = await asyncio.gather(*await submitted(batcher, 1, 2, 3))
    assert (results, doubler.batches) == ([2, 4, 6], [[1, 2, 3]])


async def test_a_batch_is_no_larger_than_its_limit_and_the_oldest_go_first() -> None:
    doubler = Doubler()
    async with batching(doubler, PATIENT) as batcher:
        await asyncio.gather(*await submitted(batcher, 1, 2, 3, 4, 5, 6))
    assert doubler.batches == [[1, 2, 3], [4, 5, 6]]


async def test_calls_of_different_keys_never_share_a_batch() -> None:
    doubler = Doubler()
    async with batching(doubler, EAGER) as batcher:
        calls = [*await submitted(batcher, 1, key="a"), *await submitted(batcher, 2, key="b")]
        await asyncio.gather(*calls, *await submitted(batcher, 3, key="a"))
    assert sorted(map(sorted, doubler.batches)) in ([[1], [2], [3]], [[1, 3], [2]])


async def test_calls_of_one_key_meet_across_those_of_another() -> None:
    doubler = Doubler()
    async with batching(doubler, PATIENT) as batcher:
        alone = await submitted(batcher, 9, key="b")
        first = await submitted(batcher, 1, 2, key="a")
        await submitted(batcher, 8, 7, key="b")
        await asyncio.gather(*alone, *first, *await submitted(batcher, 3, key="a"))
    assert doubler.batches == [[9, 8, 7], [1, 2, 3]]


async def test_a_lone_call_runs_when_the_wait_is_over() -> None:
    doubler = Doubler()
    async with batching(doubler, BatchLimits(max_size=3, max_wait_seconds=0.05, capacity=8)) as batcher:
        result, waited, _ = await batcher.submit(1, WORDS)
    assert result == 2
    assert waited >= 0.05


async def test_while_a_batch_runs_the_next_one_gathers() -> None:
    doubler = Doubler()
    doubler.open.clear()
    async with batching(doubler, EAGER) as batcher:
        calls = await submitted(batcher, 1)
        await doubler.begun.wait()
        calls += [*await submitted(batcher, 2), *await submitted(batcher, 3)]
        doubler.open.set()
        await asyncio.gather(*calls)
    assert doubler.batches == [[1], [2, 3]]


async def test_a_call_cancelled_while_it_waits_is_not_computed() -> None:
    doubler = Doubler()
    metrics = Metrics()
    async with batching(doubler, PATIENT, metrics) as batcher:
        (cancelled,) = await submitted(batcher, 1)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert metrics.registry.get_sample_value("safelight_queue_depth", {"stage": "encoder"}) == 0
        await asyncio.gather(*await submitted(batcher, 2, 3, 4))
    assert doubler.batches == [[2, 3, 4]]


async def test_a_call_cancelled_while_it_is_computed_leaves_its_mates_alone() -> None:
    doubler = Doubler()
    doubler.open.clear()
    async with batching(doubler, PATIENT) as batcher:
        cancelled, *others = await submitted(batcher, 1, 2, 3)
        await doubler.begun.wait()
        cancelled.cancel()
        doubler.open.set()
        assert await asyncio.gather(*others) == [4, 6]
    assert cancelled.cancelled()


async def test_a_failing_batch_fails_each_of_its_calls_and_no_other() -> None:
    async with batching(Doubler(), PATIENT) as batcher:
        failed = await asyncio.gather(*await submitted(batcher, 1, 13, 2), return_exceptions=True)
        assert [repr(error) for error in failed] == ["ValueError('13')"] * 3
        assert await asyncio.gather(*await submitted(batcher, 4, 5, 6)) == [8, 10, 12]


async def test_a_batch_with_too_few_results_fails_and_the_next_one_runs() -> None:
    async def forgetful(items: Sequence[int]) -> Sequence[int]:
        return items if 3 in items else items[1:]

    batcher = Batcher[int, int]("encoder", forgetful, PATIENT, Metrics())
    batcher.start()
    outcomes = await asyncio.gather(*(batcher.submit(item, WORDS) for item in (0, 1, 2)), return_exceptions=True)
    assert any(isinstance(outcome, ValueError) for outcome in outcomes)
    assert [result for result, _, _ in await asyncio.gather(*(batcher.submit(item, WORDS) for item in (3, 4, 5)))] == [
        3,
        4,
        5,
    ]
    await batcher.close()


async def test_items_need_not_be_comparable() -> None:
    async def pass_on(items: Sequence[object]) -> list[object]:
        return list(items)

    batcher = Batcher[object, object]("encoder", pass_on, PATIENT, Metrics())
    batcher.start()
    first, cancelled = [asyncio.create_task(batcher.submit(np.ones(2), WORDS)) for _ in range(2)]
    await asyncio.sleep(0)
    cancelled.cancel()
    assert len(await asyncio.gather(first, batcher.submit(np.ones(2), WORDS), batcher.submit(np.ones(2), WORDS))) == 3
    await batcher.close()


async def test_a_call_beyond_the_capacity_is_refused_with_a_time_to_come_back() -> None:
    doubler = Doubler()
    doubler.open.clear()
    async with batching(doubler, BatchLimits(max_size=1, max_wait_seconds=0.0, capacity=2)) as batcher:
        running = await submitted(batcher, 0)
        await doubler.begun.wait()
        waiting = await submitted(batcher, 1, 2)
        with pytest.raises(OverloadedError) as caught:
            await batcher.submit(3, WORDS)
        doubler.open.set()
        await asyncio.gather(*running, *waiting)
    assert caught.value.metadata == {"stage": "encoder", "capacity": "2"}
    assert caught.value.retry_after_seconds is not None
    assert caught.value.retry_after_seconds > 0


async def test_work_that_is_let_in_goes_on_beyond_the_capacity() -> None:
    doubler = Doubler()
    doubler.open.clear()
    async with batching(doubler, BatchLimits(max_size=1, max_wait_seconds=0.0, capacity=1)) as batcher:
        running = await submitted(batcher, 0)
        await doubler.begun.wait()
        waiting = await submitted(batcher, 1)
        going_on = asyncio.create_task(batcher.submit(2, WORDS, admitted=True))
        doubler.open.set()
        assert (await going_on)[0] == 4
        await asyncio.gather(*running, *waiting)


async def test_closing_cancels_what_runs_and_what_waits() -> None:
    doubler = Doubler()
    doubler.open.clear()
    async with batching(doubler, PATIENT) as batcher:
        calls = await submitted(batcher, 1, 2, 3)
        await doubler.begun.wait()
        calls += await submitted(batcher, 4)
    await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls)


async def test_batch_sizes_are_counted() -> None:
    metrics = Metrics()
    async with batching(Doubler(), PATIENT, metrics) as batcher:
        await asyncio.gather(*await submitted(batcher, 1, 2, 3))
    assert metrics.registry.get_sample_value("safelight_batch_size_sum", {"stage": "encoder"}) == 3
    assert metrics.registry.get_sample_value("safelight_batch_size_count", {"stage": "encoder"}) == 1


async def test_the_load_tells_what_waits_what_runs_and_what_it_will_take() -> None:
    doubler = Doubler()
    async with batching(doubler, BatchLimits(max_size=1, max_wait_seconds=0.0, capacity=8)) as batcher:
        for item in (1, 2):  # the first only warms up
            doubler.open.clear()
            measured = await submitted(batcher, item)
            await asyncio.sleep(0.02)
            doubler.open.set()
            await asyncio.gather(*measured)
        doubler.open.clear()
        calls = await submitted(batcher, 3, 4, 5)
        await asyncio.sleep(0)
        load = batcher.load()
        doubler.open.set()
        await asyncio.gather(*calls)
    (cost,) = load.costs
    assert (load.running, load.waiting, load.capacity) == (1, 2, 9)
    assert (cost.model, list(cost.latent_shape), cost.rows) == ("sd15", [], 1)
    assert cost.seconds >= 0.02
    assert 2 * cost.seconds <= load.backlog_seconds <= 3 * cost.seconds
    assert batcher.backlog_seconds() == 0


async def test_items_of_different_kinds_never_share_a_batch() -> None:
    doubler = Doubler()
    async with batching(doubler, EAGER) as batcher:
        await asyncio.gather(batcher.submit(1, WORDS), batcher.submit(2, WorkKind("sdxl")))
    assert sorted(doubler.batches) == [[1], [2]]


async def test_a_failed_batch_says_nothing_of_what_work_costs() -> None:
    async with batching(Doubler(), EAGER) as batcher:
        for _ in range(3):
            await asyncio.gather(*await submitted(batcher, 13), return_exceptions=True)
        assert not batcher.load().costs
