"""Whole trajectories against diffusers, on the same noise levels and with the same draws of noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from services.denoiser.models.scheduler_config import stable_diffusion_sampling
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import SAMPLERS, advance, initial_state, is_done
from tests.support.model_samplings import FLOW, STABLE_DIFFUSION

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_(_ implementation|wrap__):DeprecationWarning")

Scheduler: TypeAlias = Any  # diffusers is not typed
NOISE = STABLE_DIFFUSION.noise
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_OPTIONS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SEED, SHAPE = 11, (1, 4, 8, 8)
STEP_COUNTS = [1, 2, 5, 20, 50]

SampleScale: TypeAlias = Callable[[float], float]
"""sigma -> the scheduler's own latent over ours."""


def own_space(sigma: float) -> float:
    return 1.0


def variance_preserving(sigma: float) -> float:
    return float((sigma**2 + 1) ** -0.5)


def toy_model(x_in: Tensor, timestep: float) -> Tensor:
    """A nonlinear stand-in for the network: [1, C, H, W] -> the same shape."""
    return torch.tanh(1.3 * x_in + 0.2 * x_in.roll(1, dims=-1) + np.cos(timestep / 150))


def our_trajectory(model: ModelSampling, plan: SamplingPlan) -> list[Tensor]:
    """The latents after each step, [1, C, H, W] in the process's own space."""
    source = NoiseSource(SEED, SHAPE)
    state = initial_state(model.noise.pure_noise(source.draw(0), plan.sigmas[0]))
    trajectory = []
    while not is_done(plan, state):
        x, sigma = state.latents, plan.sigmas[state.level]
        prediction = toy_model(model.noise.model_input(x, sigma), plan.timesteps[state.level])
        state = advance(plan, state, model.noise.denoised(x, prediction, sigma), source)
        if not state.calls:
            trajectory.append(state.latents)
    return trajectory


def with_noise_levels_of(plan: SamplingPlan, scheduler: Scheduler, dtype: torch.dtype = torch.float32) -> Scheduler:
    """Replace what the scheduler derived from its own configuration by the plan's sigmas and timesteps.

    diffusers' schedulers of two calls a step have the levels between first and last twice.
    """
    scheduler.set_timesteps(len(plan.timesteps))
    sigmas, timesteps = torch.tensor(plan.sigmas, dtype=dtype), torch.tensor(plan.timesteps, dtype=dtype)
    if SAMPLERS[plan.sampler].calls_per_step == 2:
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps
    scheduler.set_begin_index(0)
    return scheduler


def diffusers_trajectory(
    model: ModelSampling, plan: SamplingPlan, scheduler: Scheduler, scale: SampleScale = own_space, **options: Any
) -> list[Tensor]:
    """The latents after each step, in our space."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    sigmas = getattr(scheduler, "sigmas", torch.empty(0))
    first = torch.randn(SHAPE, generator=generator).to(sigmas.dtype)
    sample = model.noise.pure_noise(first, plan.sigmas[0]) * scale(plan.sigmas[0])
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    calls = SAMPLERS[plan.sampler].calls_per_step
    trajectory: list[Tensor] = []
    for i, timestep in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        prediction = toy_model(x_in, float(timestep))
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
        if (i + 1) % calls == 0 or i + 1 == len(scheduler.timesteps):
            trajectory.append(sample / scale(plan.sigmas[len(trajectory) + 1]))
    return trajectory


def assert_same_trajectory(ours: list[Tensor], theirs: list[Tensor], limit: float = 1e-5) -> None:
    """Relative L2 error <= the limit after every step."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= limit, errors


def multistep(**options: Any) -> Scheduler:
    return DPMSolverMultistepScheduler(final_sigmas_type="zero", **options)


DIFFUSION: dict[str, tuple[Callable[[], Scheduler], SampleScale]] = {
    "euler": (lambda: EulerDiscreteScheduler(**BETAS), own_space),
    "euler_ancestral": (lambda: EulerAncestralDiscreteScheduler(**BETAS), own_space),
    "heun": (lambda: HeunDiscreteScheduler(**BETAS), own_space),
    "dpmpp_2m": (lambda: multistep(**BETAS), variance_preserving),
    "dpmpp_2m_sde": (lambda: multistep(**BETAS, algorithm_type="sde-dpmsolver++"), variance_preserving),
    "unipc": (
        lambda: UniPCMultistepScheduler(**BETAS, final_sigmas_type="zero"),
        variance_preserving,
    ),
}

RECTIFIED_FLOW: dict[str, Callable[[], Scheduler]] = {
    "flow_match_euler": FlowMatchEulerDiscreteScheduler,
    "flow_match_heun": FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": lambda: multistep(**FLOW_OPTIONS),
    "dpmpp_2m_sde": lambda: multistep(**FLOW_OPTIONS, algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW_OPTIONS, final_sigmas_type="zero"),
    "lcm": FlowMatchLCMScheduler,
}


@pytest.mark.parametrize("sampler", DIFFUSION)
@pytest.mark.parametrize("schedule", STABLE_DIFFUSION.schedules)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_on_a_diffusion_model_every_sampler_equals_diffusers(sampler: str, schedule: str, steps: int) -> None:
    plan = plan_sampling(STABLE_DIFFUSION, latent_shape=SHAPE[1:], sampler=sampler, schedule=schedule, steps=steps)
    make, scale = DIFFUSION[sampler]
    theirs = diffusers_trajectory(STABLE_DIFFUSION, plan, with_noise_levels_of(plan, make()), scale)
    assert_same_trajectory(our_trajectory(STABLE_DIFFUSION, plan), theirs)


ZERO_SNR = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_with_zero_terminal_snr_eulers_trajectory_is_exact_where_diffusers_rounds(steps: int) -> None:
    """diffusers takes differences of latents at sigma 4096, whose float32 is off by up to 1.4e-4 of the next latent."""
    model = stable_diffusion_sampling({**BETAS, "num_train_timesteps": 1000, **ZERO_SNR})
    plan = plan_sampling(model, latent_shape=SHAPE[1:], steps=steps)
    scheduler = EulerDiscreteScheduler(**BETAS, **ZERO_SNR)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == pytest.approx(plan.timesteps, rel=1e-6)
    ours = our_trajectory(model, plan)
    assert_same_trajectory(ours, diffusers_trajectory(model, plan, scheduler), limit=2e-4)
    sigmas = scheduler.sigmas.double()
    x, exact = NoiseSource(SEED, SHAPE).draw(0).double() * sigmas[0], []
    for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], scheduler.timesteps.tolist(), strict=True):
        scale = (sigma**2 + 1).sqrt()
        v = toy_model((x / scale).float(), timestep).double()
        x0 = x / scale**2 - v * sigma / scale
        x = x + (x - x0) / sigma * (following - sigma)
        exact.append(x)
    assert_same_trajectory(ours, exact)


# diffusers begins a little below pure noise where it takes a logarithm of alpha.
FLOW_STARTS: Mapping[str, float] = {"dpmpp_2m": 0.999, "dpmpp_2m_sde": 0.999, "unipc": 0.999}


@pytest.mark.parametrize("sampler", RECTIFIED_FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_on_a_flow_every_sampler_equals_diffusers(sampler: str, shift: float, steps: int) -> None:
    plan = plan_sampling(
        FLOW,
        latent_shape=SHAPE[1:],
        sampler=sampler,
        schedule="flow",
        schedule_parameters={"shift": shift, "sigma_max": FLOW_STARTS.get(sampler, 1.0)},
        steps=steps,
    )
    scheduler = with_noise_levels_of(plan, RECTIFIED_FLOW[sampler]())
    assert_same_trajectory(our_trajectory(FLOW, plan), diffusers_trajectory(FLOW, plan, scheduler))


@pytest.mark.parametrize("steps", STEP_COUNTS[1:])
def test_deis_equals_diffusers_up_to_the_last_step(steps: int) -> None:
    """diffusers' DEIS can't go to sigma 0; there ours returns x0, as all samplers do.

    Its x / alpha loses a float32's digits where alpha is 0.001, so it runs in float64 here.
    """
    for model, options, scale in ((STABLE_DIFFUSION, BETAS, variance_preserving), (FLOW, FLOW_OPTIONS, own_space)):
        start = {"sigma_max": 0.999} if model is FLOW else {}
        plan = plan_sampling(model, latent_shape=SHAPE[1:], sampler="deis", steps=steps, schedule_parameters=start)
        scheduler = with_noise_levels_of(plan, DEISMultistepScheduler(**options), torch.float64)
        scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2
        theirs = diffusers_trajectory(model, plan, scheduler, scale)
        assert_same_trajectory(our_trajectory(model, plan)[:-1], theirs[:-1])


def plan_at(sampler: str, scheduler: Scheduler, **parameters: float) -> SamplingPlan:
    """The scheduler's own timesteps."""
    timesteps = scheduler.timesteps.numpy().astype(np.float64)
    sigmas = (*NOISE.sigmas_at(timesteps).tolist(), 0.0)
    return SamplingPlan(sampler, sigmas, (1.0,) * len(sigmas), tuple(timesteps.tolist()), parameters)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddim_equals_diffusers_on_its_own_timesteps(eta: float, spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    plan = plan_at("ddim", scheduler, eta=eta)
    theirs = diffusers_trajectory(STABLE_DIFFUSION, plan, scheduler, variance_preserving, eta=eta)
    assert_same_trajectory(our_trajectory(STABLE_DIFFUSION, plan), theirs)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddpm_equals_diffusers_on_its_own_timesteps(spacing: str, steps: int) -> None:
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    plan = plan_at("ddpm", scheduler)
    theirs = diffusers_trajectory(STABLE_DIFFUSION, plan, scheduler, variance_preserving)
    assert_same_trajectory(our_trajectory(STABLE_DIFFUSION, plan), theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers_on_its_own_timesteps(steps: int) -> None:
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    plan = plan_at("lcm", scheduler)
    theirs = diffusers_trajectory(STABLE_DIFFUSION, plan, scheduler, variance_preserving)
    assert_same_trajectory(our_trajectory(STABLE_DIFFUSION, plan), theirs)


@pytest.mark.parametrize("model", [STABLE_DIFFUSION, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_dpmpp_3m_sde_equals_the_integral_of_its_taylor_polynomial(
    model: ModelSampling, eta: float, steps: int
) -> None:
    """k-diffusion's sampler, with its integrals over lambda done by quadrature.

    x' = sigma' / sigma e^(-eta h) x + alpha' integral of (1 + eta) e^(-(1 + eta)(h - tau)) D(tau), where D is a Taylor
    polynomial in tau / h with the differences of Lu et al. 2022 for its derivatives.
    """
    start = {"sigma_max": 0.999} if model is FLOW else {}
    plan = plan_sampling(
        model,
        latent_shape=SHAPE[1:],
        sampler="dpmpp_3m_sde",
        sampler_parameters={"eta": eta},
        schedule_parameters=start,
        steps=steps,
    )
    assert_same_trajectory(our_trajectory(model, plan), taylor_trajectory(model, plan, eta))


def taylor_trajectory(model: ModelSampling, plan: SamplingPlan, eta: float) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(SEED)
    x = model.noise.pure_noise(torch.randn(SHAPE, generator=generator), plan.sigmas[0]).double()
    seen: list[Tensor] = []
    trajectory: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(zip(plan.sigmas, plan.sigmas[1:], strict=False)):
        prediction = toy_model(model.noise.model_input(x, sigma), plan.timesteps[i])
        seen.insert(0, model.noise.denoised(x, prediction, sigma))
        if sigma_next == 0:
            x = seen[0]
        else:
            h = plan.lambdas[i + 1] - plan.lambdas[i]
            drift = plan.alphas[i + 1] * integral(h, eta, plan.lambdas, seen, i)
            noise = torch.randn(SHAPE, generator=generator) if eta else torch.zeros(SHAPE)
            deviation = sigma_next * np.sqrt(1 - np.exp(-2 * eta * h))
            x = np.exp(-eta * h) * sigma_next / sigma * x + drift + deviation * noise
        trajectory.append(x)
    return trajectory


def integral(h: float, eta: float, lambdas: tuple[float, ...], seen: list[Tensor], i: int) -> Tensor:
    """Gauss-Legendre quadrature of the polynomial under the exponential weight."""
    divided = [(seen[k] - seen[k + 1]) / (lambdas[i - k] - lambdas[i - k - 1]) for k in range(min(i, 2))]
    slope = curvature = torch.zeros(SHAPE, dtype=torch.float64)
    if divided:
        slope = divided[0]
    if len(divided) == 2:
        curvature = (divided[0] - divided[1]) / (lambdas[i] - lambdas[i - 2])
        slope = slope + curvature * (lambdas[i] - lambdas[i - 1])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for tau, weight in zip((nodes + 1) * h / 2, weights * h / 2, strict=True):
        density = (1 + eta) * np.exp(-(1 + eta) * (h - tau))
        total += weight * density * (seen[0] + slope * tau + curvature * tau**2 / 2)
    return total
