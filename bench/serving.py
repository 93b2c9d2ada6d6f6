"""The whole stack with the demo model against a diffusers server that makes one picture at a time.

    python -m bench.serving                     # 8 clients, both sides with 2 threads
    python -m bench.serving --rounds 1 --requests 2 --clients 2 --most-steps 4

Both serve the same mixed requests from the same weights to the same number of closed-loop clients, in turns within one
run; the one that waits is idle. The pictures of both sides are compared too: the work is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bench.closed_loop import draw as draw_one
from bench.closed_loop import drawn
from bench.diffusers_server import SCHEDULERS
from bench.request_mix import mixed_requests
from bench.server_process import free_port
from safelight import AsyncClient, EmbeddedStack, GenerationOptions
from safelight.embedded import server_environment, server_root

Draw = Callable[[GenerationOptions], Awaitable[bytes]]
_FEWEST_STEPS = 4
_START_SECONDS = 60.0
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Round:
    """All requests once: wall time, each request's latency in seconds, and its file."""

    seconds: float
    latencies: list[float]
    files: list[bytes]


async def run_round(draw: Draw, requests: Sequence[GenerationOptions], clients: int) -> Round:
    """Draw every request once; each client takes the next one when its last is done."""
    waiting = iter(enumerate(requests))
    latencies, files = [0.0] * len(requests), [b""] * len(requests)

    async def client() -> None:
        for index, options in waiting:
            started = time.perf_counter()
            files[index] = await draw(options)
            latencies[index] = time.perf_counter() - started

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Round(time.perf_counter() - started, latencies, files)


async def measure(stack: str, rival: str, arguments: argparse.Namespace) -> tuple[list[Round], list[Round]]:
    """Rounds of the stack and of the rival, in turns; the first of each warms up and is not counted."""
    steps = (_FEWEST_STEPS, arguments.most_steps)
    requests = mixed_requests(arguments.requests, 0, steps=steps, samplers=tuple(SCHEDULERS), determinism="default")
    ours, theirs = [], []
    with ThreadPoolExecutor(arguments.clients) as threads:
        async with AsyncClient(stack) as client:
            sides = (_draw_here(client), _draw_there(rival, threads))
            for draw in sides:
                await run_round(draw, requests[: arguments.clients], arguments.clients)
            for _ in range(arguments.rounds):
                ours.append(await run_round(sides[0], requests, arguments.clients))
                theirs.append(await run_round(sides[1], requests, arguments.clients))
    return ours, theirs


def _draw_here(client: AsyncClient) -> Draw:
    async def draw(options: GenerationOptions) -> bytes:
        return drawn(await draw_one(client, 0, options)).data

    return draw


def _draw_there(url: str, threads: ThreadPoolExecutor) -> Draw:
    def post(options: GenerationOptions) -> bytes:
        fields = ("prompt", "steps", "sampler", "guidance_scale", "seed")
        body = json.dumps({name: getattr(options, name) for name in fields}).encode()
        with urllib.request.urlopen(url, data=body, timeout=_ANSWER_SECONDS) as answer:
            file: bytes = answer.read()
        return file

    async def draw(options: GenerationOptions) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(threads, post, options)

    return draw


@contextmanager
def run_rival(threads: int) -> Iterator[str]:
    """Start the diffusers server; gives its URL."""
    port = free_port()
    command = [sys.executable, "-m", "bench.diffusers_server", f"--port={port}", f"--threads={threads}"]
    process = subprocess.Popen(command, cwd=server_root(), env=server_environment(), stderr=subprocess.DEVNULL)
    try:
        _wait_until_serving(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_until_serving(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=_START_SECONDS):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def text(ours: Sequence[Round], theirs: Sequence[Round]) -> str:
    """The rounds as a table: medians of the rounds' throughput, percentiles over all requests."""
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
    closest = min(psnr(a, b) for a, b in zip(ours[0].files, theirs[0].files, strict=True))
    return "\n".join(
        [
            _line("Safelight", ours),
            _line("diffusers, one at a time", theirs),
            f"images/s, Safelight to diffusers: {ratio:.2f} (median of {len(ours)} pairs of rounds)",
            f"the two draw the same pictures: PSNR {closest:.0f} dB at least",
        ]
    )


def _line(name: str, rounds: Sequence[Round]) -> str:
    rate = statistics.median(len(each.latencies) / each.seconds for each in rounds)
    p50, p99 = np.percentile([seconds for each in rounds for seconds in each.latencies], (50, 99))
    return f"{name}: {rate:.2f} images/s, p50 {p50:.2f} s, p99 {p99:.2f} s"


def psnr(first: bytes, second: bytes) -> float:
    """Of two picture files, in dB."""
    a, b = (np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64) for file in (first, second))
    return float(10 * np.log10(255**2 / max(np.square(a - b).mean(), 1e-9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24, help="of a round")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--most-steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    arguments = parser.parse_args()
    with EmbeddedStack(threads=arguments.threads) as stack, run_rival(arguments.threads) as rival:
        ours, theirs = asyncio.run(measure(stack.endpoint, rival, arguments))
    sys.stdout.write(text(ours, theirs) + "\n")


if __name__ == "__main__":
    main()
