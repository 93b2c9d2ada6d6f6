"""Twice as many requests as the stack can do: goodput against that at its capacity, and how fast the excess is refused.

    python -m bench.overload                    # two minutes and more on two cores, real processes
    python -m bench.overload --rounds 1 --seconds 2 --steps 2

Clients are an open loop: requests arrive at random times whether or not earlier ones are done, and nobody retries.
Every second request has a deadline, the others wait as long as the gateway lets them. The capacity is what comes out
when far too much goes in: three times what a few closed-loop clients get. Load and overload take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.closed_loop import ClosedLoop, drawn
from bench.deployment import run_deployment
from safelight import (
    AsyncClient,
    DeadlineExceededError,
    DeadlineUnreachableError,
    GenerationOptions,
    OverloadedError,
    RetryPolicy,
)

_CLIENTS = 4
_SATURATION = 3.0
_DEADLINE_REQUESTS = 6.0  # of the time that a request alone takes
_NO_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of one request, and after how many seconds."""

    kind: Literal["done", "refused", "late"]
    seconds: float


@dataclass(frozen=True)
class Phase:
    """A time of steady arrivals.

    Args:
        offered: arrivals a second.
        seconds: from the first arrival to the last outcome.
        outcomes: of every request.
        gateway_mib: resident memory of the gateway at the end.
    """

    offered: float
    seconds: float
    outcomes: list[Outcome]
    gateway_mib: float

    @property
    def goodput(self) -> float:
        """Pictures a second that were done, and in time."""
        return self.count("done") / self.seconds

    def count(self, kind: str) -> int:
        """Requests with that outcome."""
        return sum(outcome.kind == kind for outcome in self.outcomes)

    def times(self, kind: str) -> list[float]:
        """Seconds of the requests with that outcome."""
        return [outcome.seconds for outcome in self.outcomes if outcome.kind == kind]


async def send(client: AsyncClient, options: GenerationOptions, deadline_seconds: float) -> Outcome:
    """One request that is not repeated.

    Raises:
        SafelightError: of any kind but those that overload may lead to.
    """
    started = time.monotonic()
    kind: Literal["done", "refused", "late"] = "done"
    try:
        async for _ in client.stream(options, timeout_seconds=deadline_seconds):
            pass
    except (OverloadedError, DeadlineUnreachableError):
        kind = "refused"
    except DeadlineExceededError:
        kind = "late"
    return Outcome(kind, time.monotonic() - started)


async def run_phase(endpoint: str, rate: float, seconds: float, steps: int, alone: float, seed: int) -> list[Outcome]:
    """Requests at random times, at a rate, for some seconds; returns when all have ended."""
    draw = random.Random(seed)
    arrivals, moment = [], draw.expovariate(rate)
    while moment < seconds:
        arrivals.append(moment)
        moment += draw.expovariate(rate)
    started = time.monotonic()
    async with AsyncClient(endpoint, retry=RetryPolicy.none) as client:

        async def arrive(index: int, moment: float) -> Outcome:
            await asyncio.sleep(max(started + moment - time.monotonic(), 0.0))
            deadline = alone * _DEADLINE_REQUESTS if index % 2 else _NO_LIMIT_SECONDS
            return await send(client, GenerationOptions(prompt=f"cat {draw.random()}", steps=steps), deadline)

        return list(await asyncio.gather(*(arrive(index, moment) for index, moment in enumerate(arrivals))))


async def measure_unloaded(endpoint: str, seconds: float, steps: int) -> tuple[float, float]:
    """Pictures a second with a few closed-loop clients, and the seconds of a request alone.

    Raises:
        RuntimeError: a request was refused.
    """
    options = [GenerationOptions(prompt=f"cat {index}", steps=steps, seed=index) for index in range(64)]
    async with AsyncClient(endpoint, retry=RetryPolicy.none) as client:
        alone = [(await send(client, request, _NO_LIMIT_SECONDS)).seconds for request in options[:5]]
    loop = ClosedLoop(endpoint, options, _CLIENTS)
    started = time.monotonic()
    loop.start()
    await asyncio.sleep(seconds)
    drawings = await loop.end()
    return len([drawn(drawing) for drawing in drawings]) / (time.monotonic() - started), statistics.median(alone)


@dataclass(frozen=True)
class Report:
    """Phases in turns: at the capacity (images a second), and at twice of it."""

    capacity: float
    at_capacity: list[Phase]
    overloaded: list[Phase]


def measure(arguments: argparse.Namespace) -> Report:
    """Find the capacity, then run the phases."""
    # Results that clients may come back for are kept in memory for a while; here too short a while to be seen.
    flags = (f"--max-queue-seconds={arguments.queue_seconds}", "--journal-seconds=1")
    with run_deployment(gateway=flags) as deployment:
        endpoint, seconds, steps = deployment.endpoint, arguments.seconds, arguments.steps
        rate, alone = asyncio.run(measure_unloaded(endpoint, seconds, steps))

        def phase(offered: float, seed: int) -> Phase:
            started = time.monotonic()
            outcomes = asyncio.run(run_phase(endpoint, offered, seconds, steps, alone, seed))
            memory = deployment.gateway.resident_bytes / 2**20
            return Phase(offered, time.monotonic() - started, outcomes, memory)

        capacity = phase(_SATURATION * rate, 0).goodput
        pairs = [(phase(capacity, seed), phase(2 * capacity, seed)) for seed in range(1, arguments.rounds + 1)]
    return Report(capacity, [first for first, _ in pairs], [second for _, second in pairs])


def text(report: Report) -> str:
    """The phases as a table."""
    pairs = list(zip(report.at_capacity, report.overloaded, strict=True))
    ratio = statistics.median(over.goodput / at.goodput for at, over in pairs)
    refused = [seconds * 1000 for phase in report.overloaded for seconds in phase.times("refused")]
    lines = [f"capacity: {report.capacity:.2f} images/s"]
    lines += [_line("at capacity", phase) for phase in report.at_capacity]
    lines += [_line("twice that", phase) for phase in report.overloaded]
    lines.append(f"goodput at twice the capacity to that at capacity: {ratio:.2f} (median of {len(pairs)} pairs)")
    if refused:
        p50, p99 = np.percentile(refused, (50, 99))
        lines.append(f"time to refusal: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(refused)} requests)")
    return "\n".join(lines)


def _line(name: str, phase: Phase) -> str:
    return (
        f"{name}: {phase.offered:.2f} offered/s, {phase.goodput:.2f} done/s; {phase.count('done')} done, "
        f"{phase.count('refused')} refused, {phase.count('late')} late; gateway {phase.gateway_mib:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase's arrivals")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--queue-seconds", type=float, default=3.0, help="most work ahead of a request")
    sys.stdout.write(text(measure(parser.parse_args())) + "\n")


if __name__ == "__main__":
    main()
