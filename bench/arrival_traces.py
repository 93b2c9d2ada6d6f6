"""Requests for a simulated denoiser: seeded mixes, and when they arrive."""

from __future__ import annotations

import random
from dataclasses import dataclass

SHORT_STEPS, LONG_STEPS = 4, 50
MIXED_STEPS = (4, 8, 10, 15, 20, 25, 30, 50)
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m")


@dataclass(frozen=True)
class Arrival:
    """A request.

    Args:
        number: its identity in the trace.
        time: when it arrives, in steps of batch 1.
        steps: steps to do.
        rows: 2 with guidance, else 1.
        sampler: with steps and rows the key of a batcher that merges only what is equal.
    """

    number: int
    time: float
    steps: int
    rows: int
    sampler: str

    @property
    def equal_key(self) -> tuple[int, int, str]:
        """What must agree before an equal-key batcher merges two requests."""
        return self.steps, self.rows, self.sampler


def equal_requests(count: int) -> list[Arrival]:
    """20 steps each, without guidance, all there from the start."""
    return [Arrival(number, 0.0, 20, 1, SAMPLERS[0]) for number in range(count)]


def mixed_requests(count: int, seed: int) -> list[Arrival]:
    """4 to 50 steps, every other one with guidance, three samplers, all there from the start."""
    draw = random.Random(seed)
    return [
        Arrival(number, 0.0, draw.choice(MIXED_STEPS), 1 + number % 2, draw.choice(SAMPLERS)) for number in range(count)
    ]


def short_and_long(count: int, requests_per_time: float, seed: int) -> list[Arrival]:
    """Nine in ten short, one in ten long, as a Poisson stream; neither has guidance, all have one sampler.

    The samplers and the guidance are equal, which is the best that can happen to a batcher that merges only equals.
    """
    draw = random.Random(seed)
    time, trace = 0.0, []
    for number in range(count):
        time += draw.expovariate(requests_per_time)
        steps = LONG_STEPS if draw.random() < 0.1 else SHORT_STEPS
        trace.append(Arrival(number, time, steps, 1, SAMPLERS[0]))
    return trace
