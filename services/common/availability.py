"""Which of a stage's models can't be computed at the moment; told from any thread, heard on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Listener = Callable[[str, bool], None]
"""Gets a model's name, and whether it is there."""


class Availability:
    """A model is there until it is told to be away.

    Args:
        away: names of the models that are.
    """

    def __init__(self) -> None:
        self.away: set[str] = set()
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self, listener: Listener) -> None:
        """Hear of every change from now on."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Changes are heard on the running event loop; before it runs, `away` says what is."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Nothing is heard any more."""
        self._loop = None

    def tell(self, model: str, is_there: bool) -> None:
        """A model has gone, or come back."""
        if is_there == (model not in self.away):
            return
        if is_there:
            self.away.discard(model)
        else:
            self.away.add(model)
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._heard, model, is_there)

    def _heard(self, model: str, is_there: bool) -> None:
        for listener in self._listeners:
            listener(model, is_there)
