"""Denoisers killed and frozen under load: what is lost, what differs, and how soon the pictures go on elsewhere.

    python -m bench.kills                        # 100 kills (SIGKILL) and 5 freezes (SIGSTOP)
    python -m bench.kills --kills 1 --freezes 0 --requests 2 --denoisers 2

A few clients draw mixed requests in the exact class, without retrying, while denoisers that are at work are killed and
started again. Every file is compared with that of the same request in an undisturbed run. Exits 1 when one is lost or
differs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass

import numpy as np

from bench.closed_loop import ClosedLoop, Drawing, draw_alone
from bench.deployment import Deployment, run_deployment
from bench.interruptions import Blow, judge, seconds_to_resume
from bench.request_mix import mixed_requests
from bench.server_process import ServerProcess
from safelight import GeneratedImage

_FROZEN_SECONDS = 6.0
_LONGEST_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.02
_MOST_DOWN = 2


@dataclass(frozen=True)
class Report:
    """What happened: the undisturbed pictures, the drawings under fire, and the blows."""

    undisturbed: list[GeneratedImage]
    drawings: list[Drawing]
    blows: list[Blow]
    resumes: dict[str, int]


class Assault:
    """Hits denoisers that are at work and brings them back, one blow after the other.

    Args:
        deployment: whose denoisers are hit; two may be down at a time, and one always stands.
        seed: of the choice of the victims and moments.
    """

    def __init__(self, deployment: Deployment, seed: int) -> None:
        self.blows: list[Blow] = []
        self._deployment = deployment
        self._draw = random.Random(seed)
        self._fewest = max(len(deployment.stages["denoiser"]) - _MOST_DOWN, 1) + 1
        self._down: set[ServerProcess] = set()
        self._recoveries: list[asyncio.Task[None]] = []

    async def kill(self) -> None:
        """SIGKILL one, which is then started again."""
        victim = await self._choose()
        self._note("kill", victim)
        await asyncio.to_thread(victim.kill)
        victim.start()
        self._recover(victim)

    async def freeze(self) -> None:
        """SIGSTOP one, which goes on some seconds later."""
        victim = await self._choose()
        self._note("freeze", victim)
        victim.freeze()
        await asyncio.sleep(_FROZEN_SECONDS)
        victim.thaw()
        self._recover(victim)

    async def end(self) -> None:
        """Returns when every denoiser is back."""
        await asyncio.gather(*self._recoveries)

    async def _choose(self) -> ServerProcess:
        """A denoiser at work, at a random moment."""
        await asyncio.sleep(self._draw.uniform(0, _LONGEST_PAUSE_SECONDS))
        return self._draw.choice(await asyncio.to_thread(self._wait_until_busy))

    def _wait_until_busy(self) -> list[ServerProcess]:
        while not (busy := self._busy()):
            time.sleep(_POLL_SECONDS)
        return busy

    def _busy(self) -> list[ServerProcess]:
        standing = [server for server in self._deployment.stages["denoiser"] if server not in self._down]
        if min(len(standing), self._deployment.healthy("denoiser")) < self._fewest:
            return []
        return [server for server in standing if server.total("safelight_running", stage="denoiser")]

    def _note(self, kind: str, victim: ServerProcess) -> None:
        self._down.add(victim)
        self.blows.append(Blow(kind, victim.address, time.monotonic()))

    def _recover(self, victim: ServerProcess) -> None:
        async def recover() -> None:
            await asyncio.to_thread(victim.wait_until_serving)
            self._down.discard(victim)

        self._recoveries.append(asyncio.create_task(recover()))


async def run(deployment: Deployment, arguments: argparse.Namespace) -> Report:
    """Draw undisturbed, then under fire."""
    requests = mixed_requests(arguments.requests, arguments.seed, steps=(4, 30))
    undisturbed = await draw_alone(deployment.endpoint, requests)
    load, assault = ClosedLoop(deployment.endpoint, requests, arguments.clients), Assault(deployment, arguments.seed)
    load.start()
    for _ in range(arguments.kills):
        await assault.kill()
    await assault.end()
    for _ in range(arguments.freezes):
        await assault.freeze()
    await assault.end()
    drawings = await load.end()
    return Report(undisturbed, drawings, assault.blows, _resumes(deployment))


def _resumes(deployment: Deployment) -> dict[str, int]:
    """What the gateway counted, by reason."""
    return {
        reason: int(deployment.gateway.total("safelight_resumes_total", reason=reason))
        for reason in ("death", "silence", "drain")
    }


def text(report: Report) -> str:
    """The report as a table."""
    verdict = judge(report.drawings, report.undisturbed)
    recomputed = [each.image.steps_recomputed for each in report.drawings if each.image]
    lines = [
        f"{verdict.drawn} requests drawn: {verdict.lost} lost, {verdict.wrong} differ from the undisturbed run",
        f"resumed after {', '.join(f'{reason} {count}' for reason, count in report.resumes.items())}; "
        f"{sum(recomputed)} steps computed again, most for one picture {max(recomputed, default=0)}",
        *(_line(report, kind) for kind in ("kill", "freeze")),
        *sorted({f"lost: {each.error}" for each in report.drawings if each.error}),
    ]
    return "\n".join(lines)


def _line(report: Report, kind: str) -> str:
    blows = [blow for blow in report.blows if blow.kind == kind]
    times = seconds_to_resume(blows, report.drawings)
    if not times:
        return f"{len(blows)} {kind}s: no request interrupted"
    p50, p99 = np.percentile(times, (50, 99))
    return (
        f"{len(blows)} {kind}s: {len(times)} requests interrupted; to the first new step "
        f"p50 {p50:.2f} s, p99 {p99:.2f} s, most {max(times):.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--freezes", type=int, default=5)
    parser.add_argument("--denoisers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24, help="different requests, drawn over and over")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with run_deployment(denoisers=arguments.denoisers) as deployment:
        report = asyncio.run(run(deployment, arguments))
        sys.stdout.write(text(report) + "\n")
        if not judge(report.drawings, report.undisturbed).is_flawless:
            sys.exit(1)


if __name__ == "__main__":
    main()
