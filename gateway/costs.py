"""What work costs on a replica, as it has measured it, or as the nearest that it has measured says. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gateway.work import Work
from safelight.v1.load_service_pb2 import WorkCost

Curve = dict[int, float]
"""Seconds of a batch by its rows."""


class Costs:
    """Seconds of work as a replica has measured them."""

    def __init__(self, measured: Iterable[WorkCost] = ()) -> None:
        self._curves: dict[str, dict[tuple[int, ...], Curve]] = {}
        for cost in measured:
            curves = self._curves.setdefault(cost.model, {})
            curves.setdefault(tuple(cost.latent_shape), {})[cost.rows] = cost.seconds

    def seconds(self, work: Work, sharing: int = 1) -> float | None:
        """Seconds until a piece of work is done whose passes are shared by so many alike, with nothing else to do.

        A latent shape that was not measured is scaled by its area from the nearest that was. None: nothing like it was.
        """
        nearest = self._nearest(work)
        if nearest is None:
            return None
        curve, scale = nearest
        return scale * work.passes * _pass_seconds(curve, work.rows * sharing)

    def device_seconds(self, work: Work) -> float | None:
        """Seconds of the device that a piece of work takes among others: its part of the most efficient passes."""
        nearest = self._nearest(work)
        if nearest is None:
            return None
        curve, scale = nearest
        return scale * work.passes * work.rows * min(seconds / rows for rows, seconds in curve.items())

    def _nearest(self, work: Work) -> tuple[Curve, float] | None:
        """The curve of the measured shape that is nearest in area, and the area of the work's own in proportion."""
        curves = self._curves.get(work.model, {})
        alike = [shape for shape in curves if len(shape) == len(work.latent_shape)]
        if not alike:
            return None
        area = math.prod(work.latent_shape)
        shape = min(alike, key=lambda known: abs(math.log(math.prod(known) / area)))
        return curves[shape], area / math.prod(shape)


def _pass_seconds(curve: Curve, rows: int) -> float:
    """Interpolated between measured sizes, in proportion to the nearest outside them."""
    if rows in curve:
        return curve[rows]
    below = max((known for known in curve if known < rows), default=None)
    above = min((known for known in curve if known > rows), default=None)
    if below is None or above is None:
        nearest = min(curve) if below is None else below
        return curve[nearest] * rows / nearest
    return curve[below] + (curve[above] - curve[below]) * (rows - below) / (above - below)
