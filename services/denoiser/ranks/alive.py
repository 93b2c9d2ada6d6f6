"""What this process still holds of all that the ranks keep for it."""

from __future__ import annotations

from threading import Lock
from typing import Generic, TypeVar
from weakref import WeakSet

Held = TypeVar("Held")


class Alive(Generic[Held]):
    """Objects that somebody here holds; told from any thread. Whatever is not among them, the ranks may drop."""

    def __init__(self) -> None:
        self._objects: WeakSet[Held] = WeakSet()
        self._lock = Lock()

    def add(self, held: Held) -> None:
        """From now on, for as long as anybody holds it."""
        with self._lock:
            self._objects.add(held)

    def all(self) -> list[Held]:
        """Those that are held at the moment."""
        with self._lock:
            return list(self._objects)
