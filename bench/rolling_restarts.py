"""Rolling restarts of each stage under load: what fails, how soon a replica leaves, and what throughput is left.

    python -m bench.rolling_restarts                     # 50 restarts of each stage
    python -m bench.rolling_restarts --restarts 1 --quiet-seconds 1 --requests 2

Each stage has two replicas. In turns they get SIGTERM, must end with exit code 0, are started again, and the next turn
begins when the gateway gives the new one work. Clients draw mixed requests in the exact class all the time, without
retrying. Exits 1 when a request is lost or differs from the undisturbed run, or a replica ends in another way.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.closed_loop import ClosedLoop, Drawing, draw_alone
from bench.deployment import STAGES, Deployment, run_deployment
from bench.interruptions import Verdict, judge
from bench.request_mix import mixed_requests

_LEAVE_SECONDS = 60.0
_REPLICAS = 2


@dataclass(frozen=True)
class Window:
    """A span of `time.monotonic()`."""

    start: float
    end: float

    def steps_a_second(self, drawings: Sequence[Drawing]) -> float:
        """Denoising steps that clients were told of in the window; pictures differ too much to be counted."""
        steps = sum(self.start <= at < self.end for drawing in drawings for at, _ in drawing.steps)
        return steps / (self.end - self.start)


@dataclass(frozen=True)
class StageReport:
    """The restarts of one stage.

    Args:
        stage: which.
        exit_codes: of the replicas that left.
        leave_seconds: from SIGTERM to the end of the process.
        window: from the first restart to the end of the last.
    """

    stage: str
    exit_codes: list[int]
    leave_seconds: list[float]
    window: Window


@dataclass(frozen=True)
class Report:
    """All stages' restarts, the time without any before them, and what the clients got."""

    quiet: Window
    stages: list[StageReport]
    drawings: list[Drawing]
    verdict: Verdict

    @property
    def is_flawless(self) -> bool:
        """Nothing was lost, nothing differs, every replica left in good order."""
        return self.verdict.is_flawless and not any(code for stage in self.stages for code in stage.exit_codes)


def restart_in_turns(deployment: Deployment, stage: str, restarts: int, pause_seconds: float) -> StageReport:
    """Restart a stage's replicas one after the other; blocks."""
    servers = deployment.stages[stage]
    codes, seconds, started = [], [], time.monotonic()
    for turn in range(restarts):
        server = servers[turn % len(servers)]
        stopped = time.monotonic()
        codes.append(server.stop(_LEAVE_SECONDS))
        seconds.append(time.monotonic() - stopped)
        server.start()
        server.wait_until_serving()
        deployment.wait_until_healthy(stage, len(servers))
        time.sleep(pause_seconds)
    return StageReport(stage, codes, seconds, Window(started, time.monotonic()))


async def run(deployment: Deployment, arguments: argparse.Namespace) -> Report:
    """Draw undisturbed, then for a while without restarts, then with them."""
    requests = mixed_requests(arguments.requests, arguments.seed, steps=(4, 30))
    undisturbed = await draw_alone(deployment.endpoint, requests)
    load = ClosedLoop(deployment.endpoint, requests, arguments.clients)
    quiet_start = time.monotonic()
    load.start()
    await asyncio.sleep(arguments.quiet_seconds)
    quiet = Window(quiet_start, time.monotonic())
    stages = [
        await asyncio.to_thread(restart_in_turns, deployment, stage, arguments.restarts, arguments.pause_seconds)
        for stage in arguments.stages
    ]
    drawings = await load.end()
    return Report(quiet, stages, drawings, judge(drawings, undisturbed))


def text(report: Report) -> str:
    """The report as a table."""
    before = report.quiet.steps_a_second(report.drawings)
    lines = [
        f"{report.verdict.drawn} requests drawn: {report.verdict.lost} lost, "
        f"{report.verdict.wrong} differ from the undisturbed run; {before:.1f} steps/s without restarts"
    ]
    for stage in report.stages:
        during = stage.window.steps_a_second(report.drawings)
        p50, p99 = np.percentile(stage.leave_seconds, (50, 99))
        lines.append(
            f"{stage.stage}: {len(stage.exit_codes)} restarts in {stage.window.end - stage.window.start:.0f} s, "
            f"{sum(code != 0 for code in stage.exit_codes)} ended badly; left within p50 {p50:.2f} s, p99 {p99:.2f} s; "
            f"{during:.1f} steps/s, {during / before:.2f} of before"
        )
    return "\n".join([*lines, *sorted({f"lost: {each.error}" for each in report.drawings if each.error})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=50, help="of each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--pause-seconds", type=float, default=1.0, help="between two restarts")
    parser.add_argument("--quiet-seconds", type=float, default=30.0, help="under load before the first restart")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24, help="different requests, drawn over and over")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with run_deployment(encoders=_REPLICAS, denoisers=_REPLICAS, decoders=_REPLICAS) as deployment:
        report = asyncio.run(run(deployment, arguments))
        sys.stdout.write(text(report) + "\n")
        if not report.is_flawless:
            sys.exit(1)


if __name__ == "__main__":
    main()
