"""What all pictures of a request share: made when the first of them asks, and again when it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Shared(Generic[Made]):
    """One thing for several tasks.

    Args:
        make: makes it; an error goes to the task that asked, and the next one tries again.
    """

    def __init__(self, make: Callable[[], Awaitable[Made]]) -> None:
        self._make = make
        self._made: Made | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> Made:
        """The thing, made if it is not there; raises what `make` raises."""
        async with self._lock:
            if self._made is None:
                self._made = await self._make()
            return self._made

    def drop(self, lost: Made) -> None:
        """Forget one that is of no use any more, unless another task has had it replaced already."""
        if self._made is lost:
            self._made = None
