"""Laws of credits: never more than are offered, tenants take turns, and none is ever lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.credits import Credits
from safelight.errors import DeadlineExceededError
from services.common.metrics import Metrics


class Pictures:
    """Pictures that hold a credit until they are let go."""

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.metrics = Metrics()
        self.credits = Credits(lambda: self.offered, self.metrics)
        self.begun: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def start(self, *names: int, tenant: str = "", remaining_seconds: float | None = None) -> None:
        for name in names:
            self.tasks[name] = asyncio.create_task(self._make(name, tenant, remaining_seconds))
        await settle()

    async def _make(self, name: int, tenant: str, remaining_seconds: float | None) -> None:
        async with self.credits.held(tenant, remaining_seconds):
            self.begun.append(name)
            await asyncio.Event().wait()

    async def stop(self, *names: int) -> None:
        for name in names:
            self.tasks[name].cancel()
        await asyncio.gather(*(self.tasks[name] for name in names), return_exceptions=True)
        await settle()

    def shown(self, state: str) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_credits", {"state": state})


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def pictures(offered: int) -> AsyncIterator[Pictures]:
    made = Pictures(offered)
    yield made
    await made.stop(*made.tasks)
    assert (made.shown("held"), made.shown("waiting")) == (0, 0)


async def test_no_more_pictures_begin_than_there_are_credits_and_they_begin_in_order() -> None:
    async with pictures(2) as made:
        await made.start(1, 2, 3, 4)
        assert made.begun == [1, 2]
        assert (made.shown("held"), made.shown("waiting")) == (2, 2)
        await made.stop(1)
        assert made.begun == [1, 2, 3]
        await made.stop(3)
        assert made.begun == [1, 2, 3, 4]


async def test_tenants_that_wait_take_turns() -> None:
    async with pictures(1) as made:
        await made.start(0)
        await made.start(11, 12, 13, tenant="a")
        await made.start(21, 22, tenant="b")
        for name in (0, 11, 21, 12, 22):
            await made.stop(name)
        assert made.begun == [0, 11, 21, 12, 22, 13]


async def test_one_that_gives_up_while_it_waits_is_passed_over() -> None:
    async with pictures(1) as made:
        await made.start(1, 2, 3)
        await made.stop(2)
        await made.stop(1)
        assert made.begun == [1, 3]


async def test_one_that_is_cancelled_in_the_moment_of_its_turn_gives_the_credit_on() -> None:
    async with pictures(1) as made:
        await made.start(1, 2, 3)
        made.tasks[1].cancel()
        await asyncio.sleep(0)  # the credit is handed to 2, which has not run yet
        await made.stop(2)
        assert made.begun == [1, 3]


async def test_a_wait_ends_with_the_deadline() -> None:
    async with pictures(1) as made:
        await made.start(1)
        await made.start(2, remaining_seconds=0.01)
        with pytest.raises(DeadlineExceededError):
            await made.tasks[2]
        await made.stop(1)
        await made.start(3)
        assert made.begun == [1, 3]


async def test_a_stage_that_grows_or_shrinks_changes_how_many_there_are() -> None:
    async with pictures(1) as made:
        await made.start(1, 2, 3)
        made.offered = 2
        await made.start(4)
        assert made.begun == [1, 2]
        made.offered = 1
        await made.stop(1)
        assert made.begun == [1, 2]
        await made.stop(2)
        assert made.begun == [1, 2, 3]


async def test_where_nothing_is_offered_one_goes_on_to_find_out_why() -> None:
    async with pictures(0) as made:
        await made.start(1, 2)
        assert made.begun == [1]


async def test_whatever_happens_no_credit_is_lost_and_none_is_made() -> None:
    choose = random.Random(7)
    async with pictures(3) as made:
        for name in range(300):
            await made.start(name, tenant=choose.choice("abc"), remaining_seconds=choose.choice((None, 0.0, 0.001)))
            assert (made.shown("held") or 0) <= 3
            if choose.random() < 0.5:
                made.tasks[choose.randrange(name + 1)].cancel()
        await made.stop(*made.tasks)
        await made.start(1000, 1001, 1002)
        assert made.begun[-3:] == [1000, 1001, 1002]
