"""From the names in a request to a sampling plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from services.denoiser.sampling.noise_schedule import NoiseSchedule
from services.denoiser.sampling.parameters import NONE_GIVEN, resolve_parameters
from services.denoiser.sampling.sampler import SAMPLERS, SamplingPlan
from services.denoiser.sampling.schedules import SCHEDULES

Entry = TypeVar("Entry")


def plan_sampling(
    noise_schedule: NoiseSchedule,
    *,
    sampler: str,
    schedule: str,
    steps: int,
    sampler_parameters: Mapping[str, float] = NONE_GIVEN,
    schedule_parameters: Mapping[str, float] = NONE_GIVEN,
) -> SamplingPlan:
    """Resolve names and a step count to numbers; parameters that are not given take their defaults.

    Raises ValueError for an unknown name, a parameter out of its range, or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, must be at least 1")
    chosen_sampler = _look_up(SAMPLERS, "sampler", sampler)
    chosen_schedule = _look_up(SCHEDULES, "schedule", schedule)
    for_step = resolve_parameters(f"sampler {sampler!r}", chosen_sampler.parameters, sampler_parameters)
    for_sigmas = resolve_parameters(f"schedule {schedule!r}", chosen_schedule.parameters, schedule_parameters)
    sigmas = chosen_schedule.sigmas(noise_schedule, steps, **for_sigmas)
    timesteps = noise_schedule.timesteps_at(sigmas[:-1])
    return SamplingPlan(sampler, tuple(sigmas.tolist()), tuple(timesteps.tolist()), for_step)


def _look_up(registry: Mapping[str, Entry], kind: str, name: str) -> Entry:
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(sorted(registry))}")
    return registry[name]
