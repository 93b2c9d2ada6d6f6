"""What a step costs: seconds of a forward pass by its rows, learnt for each batch key while serving. Pure, no torch."""

from __future__ import annotations

import statistics
from bisect import bisect
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

# A pass that hiccuped is outvoted; a device that has become slower is believed after 3.
_WINDOW = 5
TRUSTED_SAMPLES = 3
# A pass can take longer than its size explains, but not less: so much faster, and what was known is out of date.
_FASTER = 0.75
# Seconds a row while nothing at all has been measured.
_UNMEASURED_SECONDS = 0.05
# Clients choose latent shapes, so keys come and go; the curves of the last ones are kept.
KEPT_KEYS = 64


@dataclass(frozen=True)
class CostPoint:
    """A measured point: the seconds that a forward pass of so many rows takes."""

    batch_key: Hashable
    rows: int
    seconds: float


@dataclass
class _Curve:
    """One key's measurements; `sizes` are sorted, and each has its median in `medians`."""

    samples: dict[int, deque[float]] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def record(self, rows: int, seconds: float) -> None:
        if rows not in self.samples:
            if self.sizes and rows > self.sizes[0]:
                # The first pass of a size also wakes libraries up: it counts for no more than the known ones say.
                seconds = min(seconds, self.seconds(rows))
            self.samples[rows] = deque(maxlen=_WINDOW)
            self.sizes = sorted(self.samples)
        elif seconds < _FASTER * self.medians[rows]:
            self.samples[rows].clear()
        self.samples[rows].append(seconds)
        self.medians[rows] = statistics.median_low(self.samples[rows])

    def seconds(self, rows: int) -> float:
        if rows in self.medians:
            return self.medians[rows]
        above = bisect(self.sizes, rows)
        if above in (0, len(self.sizes)):
            nearest = self.sizes[max(above - 1, 0)]
            return self.medians[nearest] * rows / nearest
        low, high = self.sizes[above - 1], self.sizes[above]
        share = (rows - low) / (high - low)
        return self.medians[low] + share * (self.medians[high] - self.medians[low])


class StepCosts:
    """Seconds of forward passes, measured and estimated."""

    def __init__(self) -> None:
        self._curves: dict[Hashable, _Curve] = {}

    def record(self, batch_key: Hashable, rows: int, seconds: float) -> None:
        """Learn from a pass of so many rows."""
        self._curves[batch_key] = self._curves.pop(batch_key, _Curve())
        self._curves[batch_key].record(rows, seconds)
        if len(self._curves) > KEPT_KEYS:
            del self._curves[next(iter(self._curves))]

    def seconds(self, batch_key: Hashable, rows: int) -> float:
        """Seconds of a pass: the median of the last ones of its size, or an estimate.

        Between two measured sizes it is interpolated; outside them a row is taken to cost what it costs at the nearest
        measured size, so that no estimate promises more than what has been seen. A row of a key that was never measured
        is taken to cost what the cheapest known one costs: a deadline is not given up on a guess.
        """
        curve = self._curves.get(batch_key)
        if curve is not None:
            return curve.seconds(rows)
        return rows * min((point.seconds / point.rows for point in self.points()), default=_UNMEASURED_SECONDS)

    def trusted_rows(self, batch_key: Hashable) -> int:
        """Rows of the largest size measured often enough to outvote an outlier; 0 where there is none."""
        curve = self._curves.get(batch_key, _Curve())
        return max((rows for rows, samples in curve.samples.items() if len(samples) >= TRUSTED_SAMPLES), default=0)

    def points(self) -> list[CostPoint]:
        """Everything measured so far."""
        return [
            CostPoint(key, rows, curve.medians[rows]) for key, curve in self._curves.items() for rows in curve.sizes
        ]
