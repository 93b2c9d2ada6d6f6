"""What a stage's batches cost, as measured while it serves: seconds by kind of work and batch size. Pure."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import NamedTuple

# A hiccup is outvoted, and a device that has become slower or faster is believed after four batches.
_SAMPLES = 7
# Clients choose the shapes, so there may be any number of them: the ones longest unused are forgotten.
_MAX_KINDS = 64


class WorkKind(NamedTuple):
    """Work of one kind costs the same: a model and, where it has one, the latent's shape without its batch axis."""

    model: str
    latent_shape: tuple[int, ...] = ()


class BatchCosts:
    """Seconds of batches, measured and estimated."""

    def __init__(self) -> None:
        self._samples: OrderedDict[WorkKind, dict[int, deque[float]]] = OrderedDict()

    def record(self, kind: WorkKind, size: int, seconds: float) -> None:
        """Learn from a batch. The first of a kind and size is not kept: it warms up, and says nothing of the next."""
        sizes = self._samples.setdefault(kind, {})
        self._samples.move_to_end(kind)
        if len(self._samples) > _MAX_KINDS:
            self._samples.popitem(last=False)
        if size in sizes:
            sizes[size].append(seconds)
        else:
            sizes[size] = deque(maxlen=_SAMPLES)

    def measured(self, kind: WorkKind) -> Mapping[int, float]:
        """Seconds of a batch by its size: the median of the last ones."""
        sizes = self._samples.get(kind, {})
        return {size: statistics.median_low(samples) for size, samples in sorted(sizes.items()) if samples}

    def seconds(self, kind: WorkKind, size: int) -> float:
        """Seconds of a batch; 0 when nothing of its kind has been measured.

        A size that has not been measured costs what the nearest one does, or in proportion where that is smaller.
        """
        measured = self.measured(kind)
        if not measured:
            return 0.0
        nearest = min(measured, key=lambda known: (known < size, abs(known - size)))
        return measured[nearest] * max(size / nearest, 1.0)

    @property
    def kinds(self) -> list[WorkKind]:
        """Every kind of work that is remembered."""
        return list(self._samples)
