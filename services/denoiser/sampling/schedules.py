"""Schedules: the noise levels that a sampler visits.

Each is a pure function of (noise schedule, steps >= 1) that returns steps + 1 sigmas as a float64 array, strictly
decreasing, ending in 0. One step goes from sigma_max straight to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from services.denoiser.sampling.noise_schedule import Float64Array, NoiseSchedule
from services.denoiser.sampling.parameters import Parameter


def scaled_linear(noise: NoiseSchedule, steps: int) -> Float64Array:
    """Evenly spaced in the training timestep, both ends included ("linspace" in Lin et al. 2024, Table 2)."""
    return _append_zero(noise.sigmas_at(np.linspace(noise.num_train_timesteps - 1, 0, steps)))


def karras(noise: NoiseSchedule, steps: int, rho: float) -> Float64Array:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5, whose rho is 7)."""
    return _append_zero(np.linspace(noise.sigma_max ** (1 / rho), noise.sigma_min ** (1 / rho), steps) ** rho)


def exponential(noise: NoiseSchedule, steps: int) -> Float64Array:
    """Evenly spaced in log sigma, that is in log-SNR (k-diffusion's `get_sigmas_exponential`)."""
    return _append_zero(np.exp(np.linspace(np.log(noise.sigma_max), np.log(noise.sigma_min), steps)))


def _append_zero(sigmas: Float64Array) -> Float64Array:
    return np.append(sigmas, 0.0)


@dataclass(frozen=True)
class Schedule:
    """A named schedule: the function `sigmas(noise, steps, **parameters)` and the parameters that it takes."""

    sigmas: Callable[..., Float64Array]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


SCHEDULES: dict[str, Schedule] = {
    "scaled_linear": Schedule(scaled_linear),
    "karras": Schedule(karras, {"rho": Parameter(7.0, low=1.0, high=100.0)}),
    "exponential": Schedule(exponential),
}
