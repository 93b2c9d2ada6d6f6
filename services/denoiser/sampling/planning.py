"""From the names in a request to a sampling plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np

from services.common.strength import start_step
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.parameters import NONE_GIVEN, resolve_parameters
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.sampler import SAMPLERS
from services.denoiser.sampling.schedules import SCHEDULES, ScheduleInputs


def plan_sampling(
    model: ModelSampling,
    *,
    latent_shape: Sequence[int],
    steps: int,
    sampler: str = "",
    schedule: str = "",
    sampler_parameters: Mapping[str, float] = NONE_GIVEN,
    schedule_parameters: Mapping[str, float] = NONE_GIVEN,
    strength: float = 1.0,
) -> SamplingPlan:
    """Resolve names and a step count to numbers; names and parameters that are not given are the model's defaults.

    latent_shape: [C, ...] without the batch axis. strength: see `start_step`; 1 is the whole schedule.

    Raises ValueError for a name that the model does not offer, a parameter out of its range, steps < 1, or a strength
    outside [0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, must be at least 1")
    sampler = _choose("sampler", model.samplers, sampler)
    schedule = _choose("schedule", model.schedules, schedule)
    for_step = resolve_parameters(f"sampler {sampler!r}", SAMPLERS[sampler].parameters, sampler_parameters)
    for_sigmas = resolve_parameters(
        f"schedule {schedule!r}", SCHEDULES[schedule].parameters, schedule_parameters, model.schedules[schedule]
    )
    image_tokens = prod(latent_shape[1:]) // model.elements_per_token
    sigmas = SCHEDULES[schedule].sigmas(ScheduleInputs(model, steps, image_tokens, for_sigmas))
    if not (np.diff(sigmas) < 0).all():
        raise ValueError(f"schedule {schedule!r}: its noise levels do not fall with the parameters {for_sigmas}")
    sigmas = sigmas[start_step(steps, strength) :]
    alphas = tuple(map(model.noise.alpha, sigmas.tolist()))
    timesteps = model.noise.timesteps_at(sigmas[:-1])
    return SamplingPlan(sampler, tuple(sigmas.tolist()), alphas, tuple(timesteps.tolist()), for_step)


def _choose(kind: str, offered: Collection[str], name: str) -> str:
    """The name, or the first that is offered if it is empty."""
    if name and name not in offered:
        raise ValueError(f"the model has no {kind} {name!r}; choose from {', '.join(sorted(offered))}")
    return name or next(iter(offered))
