"""Two computations that take turns in one process, so that what else the machine does meets both alike.

On a busy machine the CPU seconds of all threads say more than the wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Step = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round: by the wall's clock and of the process's threads together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def time_in_turns(steps: tuple[Step, Step], rounds: int) -> tuple[Timing, Timing]:
    """Times both in every round; who goes first alternates."""
    timings = Timing(), Timing()
    for turn in range(rounds):
        for index in (turn % 2, 1 - turn % 2):
            timed(steps[index], timings[index])
    return timings


def timed(step: Step, timing: Timing) -> Tensor:
    """What a call returns; the time it took is added to `timing`."""
    wall, cpu = time.perf_counter(), time.process_time()
    output = step()
    timing.wall.append(time.perf_counter() - wall)
    timing.cpu.append(time.process_time() - cpu)
    return output


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((actual - expected).abs().max() / expected.abs().max())


def ratios(ours: Timing, theirs: Timing, clock: Literal["wall", "cpu"]) -> list[float]:
    """Ours over theirs, round by round."""
    pairs = zip(getattr(ours, clock), getattr(theirs, clock), strict=True)
    return [our_seconds / their_seconds for our_seconds, their_seconds in pairs]


def summary(values: Sequence[float]) -> str:
    """Median and range, 24 characters wide."""
    return f"{statistics.median(values):9.3f} ({min(values):.2f} to {max(values):.2f})".rjust(24)
