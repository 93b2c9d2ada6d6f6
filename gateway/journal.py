"""What has happened to one request: its numbered events, written once, read by any number of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from safelight.errors import OverloadedError
from safelight.v1.generation_service_pb2 import GenerateResponse


class Journal:
    """The events of a request, from the first to the last. Confined to the event loop.

    Writing never waits: a slow reader costs memory, which `size` tells, and holds up nobody's work.

    Args:
        keeps: events stay for later readers; otherwise each is dropped as soon as the journal's only reader has it.
        resized: told by how many bytes the journal has grown, or shrunk.
    """

    def __init__(self, keeps: bool, resized: Callable[[int], None]) -> None:
        self.size = 0
        """Bytes of the events that are kept."""
        self.accepted = False
        """Whether there has been an event."""
        self.ended = False
        self._keeps = keeps
        self._resized = resized
        self._events: list[GenerateResponse | None] = []
        self._error: BaseException | None = None
        self._dropped = False
        self._news = asyncio.Event()

    def append(self, event: GenerateResponse) -> None:
        """Write an event down; it gets its number here, from 1 without gaps."""
        self.accepted = True
        self._events.append(event)
        event.sequence = len(self._events)
        self._resize(event.ByteSize())
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more happens; with an error, every reader gets it after the last event."""
        self.ended, self._error = True, error
        self._tell()

    def drop(self) -> None:
        """Forget all events: their memory is needed for others."""
        self._dropped = True
        self._events.clear()
        self._resize(-self.size)
        self._tell()

    async def read(self, after: int = 0) -> AsyncGenerator[GenerateResponse, None]:
        """The events after number `after`, those to come included; all of them if there has never been such a number.

        Raises:
            OverloadedError: they were dropped before they were read.
            Exception: what the request ended with.
        """
        position = after if after <= len(self._events) else 0
        while True:
            if self._dropped:
                raise _dropped_too_early()
            if position < len(self._events):
                yield self._take(position)
                position += 1
            elif self.ended:
                if self._error is not None:
                    raise self._error
                return
            else:
                await self._news.wait()

    def _take(self, position: int) -> GenerateResponse:
        event = self._events[position]
        assert event is not None, "a journal that does not keep its events has one reader"
        if not self._keeps:
            self._events[position] = None
            self._resize(-event.ByteSize())
        return event

    def _resize(self, change: int) -> None:
        self.size += change
        self._resized(change)

    def _tell(self) -> None:
        """Wake every reader that waits."""
        self._news.set()
        self._news = asyncio.Event()


def _dropped_too_early() -> OverloadedError:
    return OverloadedError(
        "the result was not read in time and has been dropped: send the request again and read it faster, or raise the "
        "gateway's journal_bytes",
        retry_after_seconds=1.0,
        stage="gateway",
    )
