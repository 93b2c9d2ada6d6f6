"""Eight different requests at once at one real denoiser, each against itself alone.

    python -m bench.mixed_load                  # 4 to 50 steps, guidance on and off, three samplers
    python -m bench.mixed_load --requests 4 --most-steps 8 --rounds 1

Latents are compared: in the default class up to rounding, in the exact class bit for bit. Then a short request comes in
the middle of a long one, and its time is set against its time alone. Exits 1 when a latent differs.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import safetensors.numpy

from bench.closed_loop import draw, draw_alone, drawn
from bench.deployment import Deployment, run_deployment
from bench.request_mix import mixed_requests
from safelight import AsyncClient, GeneratedImage, GenerationOptions, Progress, RetryPolicy
from services.denoiser.settings import DenoiserSettings

_SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m")
_SHORT_STEPS = 4
_TOLERANCE = 1e-5
_STEPS_OF_LEAD = 3


@dataclass(frozen=True)
class Company:
    """Requests that ran together.

    Args:
        determinism: their class.
        difference: the largest from a request's latent alone, relative to the latent's largest element.
        model_calls: steps of a batch that the denoiser ran.
        fewest_calls: what the best order would have needed.
    """

    determinism: str
    difference: float
    model_calls: int
    fewest_calls: int

    @property
    def is_alike(self) -> bool:
        """Whether each request got its own latent."""
        return self.difference <= (0.0 if self.determinism == "exact" else _TOLERANCE)


async def together(deployment: Deployment, requests: Sequence[GenerationOptions]) -> Company:
    """Run the requests one by one, then all at once."""
    alone = await draw_alone(deployment.endpoint, requests)
    calls = _model_calls(deployment)
    async with AsyncClient(deployment.endpoint, retry=RetryPolicy.none) as client:
        drawings = await asyncio.gather(*(draw(client, index, each) for index, each in enumerate(requests)))
    difference = max(relative_difference(a, b) for a, b in zip(alone, map(drawn, drawings), strict=True))
    return Company(requests[0].determinism, difference, _model_calls(deployment) - calls, fewest_calls(requests))


def relative_difference(alone: GeneratedImage, in_company: GeneratedImage) -> float:
    """Largest difference of two latents, relative to the largest element."""
    expected, given = (safetensors.numpy.load(each.data)["latents"] for each in (alone, in_company))
    return float(np.abs(expected - given).max() / np.abs(expected).max())


def fewest_calls(requests: Sequence[GenerationOptions]) -> int:
    """Steps of a batch that must be run: no fewer than the longest request has steps, nor than its rows fit into.

    In the exact class requests share none.
    """
    if requests[0].determinism == "exact":
        return sum(each.steps or 0 for each in requests)
    steps_and_rows = [(each.steps or 0, 2 if (each.guidance_scale or 0) > 1 else 1) for each in requests]
    rows = sum(steps * rows for steps, rows in steps_and_rows)
    return max(max(steps for steps, _ in steps_and_rows), math.ceil(rows / DenoiserSettings().max_batch_rows))


async def short_amid_long(deployment: Deployment, long: GenerationOptions) -> tuple[float, float]:
    """Seconds of a short request alone, and in the middle of a long one."""
    short = replace(long, steps=_SHORT_STEPS)
    async with AsyncClient(deployment.endpoint, retry=RetryPolicy.none) as client:
        alone = await draw(client, 0, short)
        stream = client.stream(long)
        async for event in stream:
            if isinstance(event, Progress) and event.stage == "denoiser" and event.step == _STEPS_OF_LEAD:
                break
        amid = await draw(client, 0, short)
        await stream.aclose()
    return alone.seconds, amid.seconds


def _model_calls(deployment: Deployment) -> int:
    return int(deployment.stages["denoiser"][0].total("safelight_denoise_step_seconds_count"))


async def run(deployment: Deployment, arguments: argparse.Namespace) -> list[Company]:
    """Both classes, then the short request; prints as it goes."""
    companies = []
    for determinism in ("default", "exact"):
        mixed = mixed_requests(
            arguments.requests, 0, steps=(4, arguments.most_steps), samplers=_SAMPLERS, determinism=determinism
        )
        company = await together(deployment, [replace(each, format="latents") for each in mixed])
        companies.append(company)
        sys.stdout.write(
            f"{arguments.requests} requests, {determinism} class: largest relative difference from alone "
            f"{company.difference:.1e}; {company.model_calls} model calls, {company.fewest_calls} at best\n"
        )
    long = GenerationOptions(prompt="a cat", steps=arguments.most_steps, guidance_scale=4.0, seed=1)
    pairs = [await short_amid_long(deployment, long) for _ in range(arguments.rounds)]
    alone, amid = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    sys.stdout.write(
        f"{_SHORT_STEPS} steps alone {alone:.2f} s, amid {arguments.most_steps} steps {amid:.2f} s: {ratio:.2f} times\n"
    )
    return companies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--most-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="of the short request")
    arguments = parser.parse_args()
    with run_deployment() as deployment:
        companies = asyncio.run(run(deployment, arguments))
        if not all(company.is_alike for company in companies):
            sys.exit(1)


if __name__ == "__main__":
    main()
