"""Seconds of work that is accepted and not yet done. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from services.denoiser.cost_curve import StepCosts
from services.denoiser.step_work import Request, StepWork


def backlog_seconds(works: Iterable[StepWork[Request]], costs: StepCosts, max_rows: int) -> float:
    """Seconds until these are done if nothing else comes, in passes of the sizes that they allow and that pay."""
    seconds = 0.0
    shared: dict[Hashable, list[tuple[int, int]]] = {}
    for work in works:
        if work.needs.alone:
            seconds += work.left * work.step_seconds(costs)
        else:
            shared.setdefault(work.needs.batch_key, []).append((work.left, work.needs.rows))
    return seconds + sum(_key_seconds(key, parts, costs, max_rows) for key, parts in shared.items())


def _key_seconds(key: Hashable, parts: list[tuple[int, int]], costs: StepCosts, max_rows: int) -> float:
    """The requests of a key, as (steps left, rows), side by side: as each ends the passes have fewer rows."""
    rows = sum(each for _, each in parts)
    seconds, done = 0.0, 0
    for steps, each in sorted(parts):
        seconds += (steps - done) * rows * _row_seconds(key, min(rows, max_rows), costs)
        rows, done = rows - each, steps
    return seconds


def _row_seconds(key: Hashable, most: int, costs: StepCosts) -> float:
    return min(costs.seconds(key, rows) / rows for rows in range(1, most + 1))
