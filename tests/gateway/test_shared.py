"""One thing for several tasks: made once, made again when it was lost."""

from __future__ import annotations

import asyncio

import pytest

from gateway.shared import Shared


class Maker:
    """Makes a new list each time, after it has let others run; fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.made, self._failures = 0, failures

    async def __call__(self) -> list[int]:
        await asyncio.sleep(0)
        self.made += 1
        if self.made <= self._failures:
            raise ValueError("not yet")
        return [self.made]


async def test_all_who_ask_get_the_same() -> None:
    shared = Shared(maker := Maker())
    first, second = await asyncio.gather(shared.get(), shared.get())
    assert first is second
    assert maker.made == 1


async def test_what_was_lost_is_made_again_once_for_all() -> None:
    shared = Shared(maker := Maker())
    lost = await shared.get()
    shared.drop(lost)
    renewed = await shared.get()
    shared.drop(lost)  # by a task that was slower to notice
    assert await shared.get() is renewed is not lost
    assert maker.made == 2


async def test_an_error_goes_to_who_asked_and_the_next_one_tries_again() -> None:
    shared = Shared(Maker(failures=1))
    with pytest.raises(ValueError, match="not yet"):
        await shared.get()
    assert await shared.get() == [2]
