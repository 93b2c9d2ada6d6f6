"""Requests that differ in everything that requests of one latent shape may differ in."""

from __future__ import annotations

import random
from collections.abc import Sequence

from safelight import GenerationOptions

_PROMPTS = ("a cat", "a rocket", "a red apple", "picture of a snail", "a clock", "a green tree", "an octopus", "a key")
SAMPLERS = ("euler", "euler_ancestral", "ddim", "dpmpp_2m")
_GUIDANCE_SCALES = (1.0, 4.0)  # off and on


def mixed_requests(
    count: int, seed: int, *, steps: tuple[int, int], samplers: Sequence[str] = SAMPLERS, determinism: str = "exact"
) -> list[GenerationOptions]:
    """Requests that each have another prompt, sampler, guidance, seed and number of steps.

    Args:
        count: how many.
        seed: of the draw; equal arguments give equal requests.
        steps: fewest and most steps; every mix has both.
        samplers: taken in turns.
        determinism: class of all of them.
    """
    draw = random.Random(seed)
    counts = [*steps, *(draw.randint(*steps) for _ in range(count))][:count]
    draw.shuffle(counts)
    return [
        GenerationOptions(
            prompt=draw.choice(_PROMPTS),
            steps=steps_to_run,
            sampler=samplers[index % len(samplers)],
            guidance_scale=_GUIDANCE_SCALES[index // len(samplers) % 2],
            seed=draw.randrange(2**31),
            determinism=determinism,
        )
        for index, steps_to_run in enumerate(counts)
    ]
