"""Schedules: the noise levels that a sampler visits.

Each is a pure function that returns steps + 1 sigmas as a float64 array, strictly decreasing, ending in 0. One step
goes from the first sigma straight to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp

import numpy as np
from scipy.special import betaincinv

from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.noise_process import Float64Array, NoiseProcess
from services.denoiser.sampling.parameters import Parameter


def scaled_linear(noise: NoiseProcess, steps: int) -> Float64Array:
    """Evenly spaced in the training timestep, both ends included ("linspace" in Lin et al. 2024, Table 2)."""
    first, last = noise.timesteps_at(np.array([noise.sigma_max, noise.sigma_min]))
    return _append_zero(noise.sigmas_at(np.linspace(first, last, steps)))


def karras(noise: NoiseProcess, steps: int, rho: float) -> Float64Array:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5, whose rho is 7)."""
    return _append_zero(np.linspace(noise.sigma_max ** (1 / rho), noise.sigma_min ** (1 / rho), steps) ** rho)


def exponential(noise: NoiseProcess, steps: int) -> Float64Array:
    """Evenly spaced in log sigma (k-diffusion's `get_sigmas_exponential`)."""
    return _append_zero(np.exp(np.linspace(np.log(noise.sigma_max), np.log(noise.sigma_min), steps)))


def beta_quantiles(noise: NoiseProcess, steps: int, alpha: float, beta: float) -> Float64Array:
    """Quantiles of a beta distribution over sigma, dense at both ends (Lee et al. 2024, as diffusers does it)."""
    quantiles = betaincinv(alpha, beta, np.linspace(1.0, 0.0, steps))
    return _append_zero(noise.sigma_min + quantiles * (noise.sigma_max - noise.sigma_min))


def sgm_uniform(noise: NoiseProcess, steps: int) -> Float64Array:
    """Evenly spaced in the training timestep, the last one left out (Stability AI's generative-models)."""
    first, last = noise.timesteps_at(np.array([noise.sigma_max, noise.sigma_min]))
    return _append_zero(noise.sigmas_at(np.linspace(first, last, steps + 1)[:-1]))


def ddim_spacing(noise: NoiseProcess, steps: int) -> Float64Array:
    """Every (1000 // steps)-th training timestep, from 1 on ("leading" in Lin et al. 2024, Table 2, offset by 1)."""
    last_timestep = noise.timesteps_at(np.array([noise.sigma_max])).round()
    stride = (last_timestep + 1) // steps
    return _append_zero(noise.sigmas_at(np.arange(steps)[::-1] * stride + 1))


def trailing(noise: NoiseProcess, steps: int) -> Float64Array:
    """Every (1000 / steps)-th training timestep, counted from the last one ("trailing" in Lin et al. 2024, Table 2)."""
    count = noise.timesteps_at(np.array([noise.sigma_max])).round() + 1
    return _append_zero(noise.sigmas_at((count - np.arange(steps) * (count / steps)).round() - 1))


def ays(noise: NoiseProcess, timesteps: Sequence[int], steps: int) -> Float64Array:
    """Align Your Steps (Sabour et al. 2024): log-linear between the noise levels found, the last of which becomes 0."""
    log_sigmas = np.log(noise.sigmas_at(np.array(timesteps, dtype=np.float64)))
    positions = np.linspace(0, len(timesteps) - 1, steps + 1)[:-1]
    return _append_zero(np.exp(np.interp(positions, np.arange(len(timesteps)), log_sigmas)))


def flow(steps: int, shift: float, shift_terminal: float, sigma_max: float, sigma_min: float) -> Float64Array:
    """Evenly spaced from sigma_max to sigma_min, then shifted towards noise (Esser et al. 2024, eq. 23).

    sigma_min 0 is the end itself, one step after the last model call. shift_terminal > 0 stretches the shifted sigmas
    so that the last one before 0 is this (diffusers' `stretch_shift_to_terminal`).
    """
    even = np.linspace(sigma_max, sigma_min, steps) if sigma_min > 0 else np.linspace(sigma_max, 0.0, steps + 1)[:-1]
    sigmas = shift * even / (1.0 - even + shift * even)
    if shift_terminal > 0 and sigmas[-1] < 1:
        sigmas = 1.0 - (1.0 - sigmas) * (1.0 - shift_terminal) / (1.0 - sigmas[-1])
    return _append_zero(sigmas)


def flow_dynamic(
    steps: int,
    image_tokens: int,
    base_shift: float,
    max_shift: float,
    base_tokens: float,
    max_tokens: float,
    **of_flow: float,
) -> Float64Array:
    """`flow` with a shift of exp(mu), mu linear in the latent's tokens and not clamped (FLUX.1's `get_schedule`).

    base_shift, max_shift: mu at base_tokens and at max_tokens.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return flow(steps, shift=exp(base_shift + slope * (image_tokens - base_tokens)), **of_flow)


def _append_zero(sigmas: Float64Array) -> Float64Array:
    return np.append(sigmas, 0.0)


@dataclass(frozen=True)
class ScheduleInputs:
    """All that a schedule may look at.

    model: whose noise levels they are.
    image_tokens: tokens that the latent has in the model.
    parameters: a value for each parameter of the schedule.
    """

    model: ModelSampling
    steps: int
    image_tokens: int
    parameters: Mapping[str, float]

    @property
    def noise(self) -> NoiseProcess:
        """How the model's latents are noised."""
        return self.model.noise


@dataclass(frozen=True)
class Schedule:
    """A named schedule and the parameters that it takes."""

    sigmas: Callable[[ScheduleInputs], Float64Array]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_FLOW_PARAMETERS = {
    "shift_terminal": Parameter(0.0, low=0.0, high=0.9),
    "sigma_max": Parameter(1.0, low=0.01, high=1.0),
    "sigma_min": Parameter(0.0, low=0.0, high=0.009),
}

SCHEDULES: dict[str, Schedule] = {
    "scaled_linear": Schedule(lambda s: scaled_linear(s.noise, s.steps)),
    "karras": Schedule(
        lambda s: karras(s.noise, s.steps, **s.parameters), {"rho": Parameter(7.0, low=1.0, high=100.0)}
    ),
    "exponential": Schedule(lambda s: exponential(s.noise, s.steps)),
    "beta": Schedule(
        lambda s: beta_quantiles(s.noise, s.steps, **s.parameters),
        {"alpha": Parameter(0.6, low=0.1, high=10.0), "beta": Parameter(0.6, low=0.1, high=10.0)},
    ),
    "sgm_uniform": Schedule(lambda s: sgm_uniform(s.noise, s.steps)),
    "ddim": Schedule(lambda s: ddim_spacing(s.noise, s.steps)),
    "trailing": Schedule(lambda s: trailing(s.noise, s.steps)),
    "ays": Schedule(lambda s: ays(s.noise, s.model.ays_timesteps, s.steps)),
    "flow": Schedule(
        lambda s: flow(s.steps, **s.parameters), {"shift": Parameter(1.0, low=0.01, high=100.0)} | _FLOW_PARAMETERS
    ),
    "flow_dynamic": Schedule(
        lambda s: flow_dynamic(s.steps, s.image_tokens, **s.parameters),
        {
            "base_shift": Parameter(0.5, low=0.0, high=4.0),
            "max_shift": Parameter(1.15, low=0.0, high=4.0),
            "base_tokens": Parameter(256.0, low=1.0, high=512.0),
            "max_tokens": Parameter(4096.0, low=2048.0, high=1e6),
        }
        | _FLOW_PARAMETERS,
    ),
}
