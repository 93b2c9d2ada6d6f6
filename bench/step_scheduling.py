"""The step scheduler on a synthetic device, against one request at a time and a batcher that merges only equals.

    python -m bench.step_scheduling

A discrete-event simulation of the scheduler that the denoiser runs; nothing is computed and nothing is timed, so a run
gives the same figures on every machine. Time is counted in steps of batch 1. The device's step time follows a published
curve, on which merging pays, or a line, on which it can't. Ours starts without a measurement and learns the curve.

Closed loop: 8 clients, each of which sends its next request when it has the result of the last.
Open loop: Poisson arrivals, nine in ten requests with 4 steps and one in ten with 50; none has guidance and all have
one sampler, which is the best that can happen to the batcher of equals. A deadline is three times what the request
takes by itself. The load is 0.8 of a policy's capacity: the throughput at which it works off such requests when all are
there at once. Ours lets requests go whose deadline has passed, as the denoiser does, and its percentiles are of those
that ended; the other two know no deadlines, so ours is shown without them as well. Figures are medians over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

from bench.arrival_traces import LONG_STEPS, SHORT_STEPS, Arrival, equal_requests, mixed_requests, short_and_long
from bench.step_policies import MAX_ROWS, EqualKeyBatcher, StepSchedulerPolicy
from bench.synthetic_device import DeviceCurve, Run, SchedulingPolicy, linear_curve, published_curve, simulate

CLIENTS = 8
LOAD = 0.8
DEADLINE_STRETCH = 3.0
CURVES = {"published": published_curve, "linear": linear_curve}

MakePolicy = Callable[[DeviceCurve], SchedulingPolicy]

OURS, OURS_WITH_DEADLINES = "ours", "ours, deadlines"
SERIAL, EQUALS = "one at a time", "equals, FIFO"
POLICIES: dict[str, MakePolicy] = {
    OURS: lambda curve: StepSchedulerPolicy(curve, None),
    OURS_WITH_DEADLINES: lambda curve: StepSchedulerPolicy(curve, DEADLINE_STRETCH),
    SERIAL: lambda curve: EqualKeyBatcher(1),
    EQUALS: lambda curve: EqualKeyBatcher(MAX_ROWS),
}


@dataclass(frozen=True)
class OpenLoop:
    """One policy on one trace: throughput, seconds from arrival to end of what ended, and shares that were in time."""

    throughput: float
    p50: float
    p99: float
    short_in_time: float
    long_in_time: float


def main() -> None:
    """Runs the simulations and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of a trace")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for name, curve in CURVES.items():
        sys.stdout.write(closed_loop_report(name, curve, options.requests // 5, range(options.seeds)))
        sys.stdout.write(open_loop_report(name, curve, options.requests, range(options.seeds)))
    sys.stdout.write(learning_report(options.requests // 5))


def closed_loop_report(name: str, curve: DeviceCurve, requests: int, seeds: Iterable[int]) -> str:
    """Throughput of 8 clients as multiples of one request at a time."""
    equal = _gains(curve, equal_requests(requests))
    mixed = [_gains(curve, mixed_requests(requests, seed)) for seed in seeds]
    lines = [f"\n{name} curve, {CLIENTS} clients: throughput over one request at a time   equal   mixed"]
    for policy in (OURS, EQUALS):
        median = statistics.median(gains[policy] for gains in mixed)
        lines.append(f"  {policy:66s}{equal[policy]:6.2f}x {median:6.2f}x")
    return "\n".join(lines) + "\n"


def _gains(curve: DeviceCurve, trace: Sequence[Arrival]) -> dict[str, float]:
    runs = {name: simulate(POLICIES[name](curve), curve, trace, CLIENTS) for name in (OURS, SERIAL, EQUALS)}
    return {name: run.throughput / runs[SERIAL].throughput for name, run in runs.items()}


def open_loop_report(name: str, curve: DeviceCurve, requests: int, seeds: Sequence[int]) -> str:
    """Each policy at its own load, and the rivals at the load of ours."""
    capacity = {policy: _capacity(POLICIES[policy], curve, requests // 2) for policy in (OURS, SERIAL, EQUALS)}
    capacity[OURS_WITH_DEADLINES] = capacity[OURS]
    header = "throughput      p50      p99  short in time  long in time"
    lines = [f"\n{name} curve, load {LOAD} of the policy's own capacity     {header}"]
    lines += [f"  {policy:44s}{_row(policy, curve, requests, capacity[policy], seeds)}" for policy in POLICIES]
    lines += [f"{name} curve, load {LOAD} of our capacity"]
    lines += [f"  {policy:44s}{_row(policy, curve, requests, capacity[OURS], seeds)}" for policy in (SERIAL, EQUALS)]
    return "\n".join(lines) + "\n"


def _capacity(make: MakePolicy, curve: DeviceCurve, requests: int) -> float:
    """Requests a unit of time when all are there at once."""
    return simulate(make(curve), curve, short_and_long(requests, float("inf"), seed=0)).throughput


def _row(policy: str, curve: DeviceCurve, requests: int, capacity: float, seeds: Iterable[int]) -> str:
    traces = [short_and_long(requests, LOAD * capacity, seed) for seed in seeds]
    results = [_measure(simulate(POLICIES[policy](curve), curve, trace), curve) for trace in traces]
    throughput, p50, p99, short, long = (
        statistics.median(column) for column in zip(*map(astuple, results), strict=True)
    )
    return f"{throughput:10.3f} {p50:8.1f} {p99:8.1f} {short:14.1%} {long:13.1%}"


def _measure(run: Run, curve: DeviceCurve) -> OpenLoop:
    times = {number: end - run.trace[number].time for number, end in run.finished.items()}
    ordered = sorted(times.values())
    return OpenLoop(
        run.throughput,
        ordered[len(ordered) // 2],
        ordered[len(ordered) * 99 // 100],
        _in_time(run, times, curve, SHORT_STEPS),
        _in_time(run, times, curve, LONG_STEPS),
    )


def _in_time(run: Run, times: dict[int, float], curve: DeviceCurve, steps: int) -> float:
    """Share of the requests of so many steps that ended within their deadline."""
    kind = [arrival for arrival in run.trace if arrival.steps == steps]
    limit = DEADLINE_STRETCH * steps
    in_time = [each for each in kind if times.get(each.number, float("inf")) <= limit * curve(each.rows) + 1e-9]
    return len(in_time) / max(len(kind), 1)


def learning_report(requests: int) -> str:
    """What was learnt of the published curve from nothing, while 8 clients' mixed requests were served."""
    policy = StepSchedulerPolicy(published_curve, None)
    simulate(policy, published_curve, mixed_requests(requests, seed=0), CLIENTS)
    lines = ["\nlearnt while serving (rows: seconds, the device's)"]
    lines += [
        f"  {point.rows:3d}: {point.seconds:.2f} {published_curve(point.rows):.2f}" for point in policy.costs.points()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
