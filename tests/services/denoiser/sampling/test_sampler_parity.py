"""Whole trajectories against diffusers, on the same noise levels and with the same draws of noise."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import advance, initial_state, is_done
from tests.support.model_samplings import STABLE_DIFFUSION

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Scheduler: TypeAlias = Any  # diffusers is not typed
NOISE = STABLE_DIFFUSION.noise
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEED, SHAPE = 11, (1, 4, 8, 8)
STEP_COUNTS = [1, 2, 5, 20, 50]


def toy_epsilon(x_in: Tensor, timestep: float) -> Tensor:
    """A nonlinear stand-in for the UNet: [1, C, H, W] -> the same shape."""
    return torch.tanh(1.3 * x_in + 0.2 * x_in.roll(1, dims=-1) + np.cos(timestep / 150))


def our_trajectory(plan: SamplingPlan) -> list[Tensor]:
    """The latents after each step, [1, C, H, W] in variance-exploding space."""
    source = NoiseSource(SEED, SHAPE)
    state = initial_state(NOISE.pure_noise(source.draw(0), plan.sigmas[0]))
    trajectory = []
    while not is_done(plan, state):
        x, i = state.latents, state.step_index
        epsilon = toy_epsilon(NOISE.model_input(x, plan.sigmas[i]), plan.timesteps[i])
        state = advance(plan, state, NOISE.denoised(x, epsilon, plan.sigmas[i]), source)
        trajectory.append(state.latents)
    return trajectory


def with_noise_levels_of(plan: SamplingPlan, scheduler: Scheduler) -> Scheduler:
    """Replace what the scheduler derived from its own configuration by the plan's sigmas and timesteps."""
    scheduler.set_timesteps(len(plan.timesteps))
    scheduler.sigmas = torch.tensor(plan.sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(plan.timesteps, dtype=torch.float32)
    scheduler.set_begin_index(0)
    return scheduler


def diffusers_trajectory(
    plan: SamplingPlan, scheduler: Scheduler, sample_scale: Callable[[float], float], **step_options: Any
) -> list[Tensor]:
    """The latents after each step. sample_scale(sigma): the scheduler's own latent over the variance-exploding one."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    sample = torch.randn(SHAPE, generator=generator) * plan.sigmas[0] * sample_scale(plan.sigmas[0])
    trajectory = []
    for i, timestep in enumerate(scheduler.timesteps):
        epsilon = toy_epsilon(scheduler.scale_model_input(sample, timestep), plan.timesteps[i])
        sample = scheduler.step(epsilon, timestep, sample, generator=generator, **step_options).prev_sample
        trajectory.append(sample / sample_scale(plan.sigmas[i + 1]))
    return trajectory


def variance_exploding(sigma: float) -> float:
    return 1.0


def variance_preserving(sigma: float) -> float:
    return float((sigma**2 + 1) ** -0.5)


def assert_same_trajectory(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Relative L2 error <= 1e-5 after every step."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-5, errors


@pytest.mark.parametrize("schedule", STABLE_DIFFUSION.schedules)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_euler_equals_diffusers(schedule: str, steps: int) -> None:
    plan = plan_sampling(STABLE_DIFFUSION, latent_shape=SHAPE[1:], sampler="euler", schedule=schedule, steps=steps)
    scheduler = with_noise_levels_of(plan, EulerDiscreteScheduler(**BETAS))
    assert_same_trajectory(our_trajectory(plan), diffusers_trajectory(plan, scheduler, variance_exploding))


@pytest.mark.parametrize("schedule", STABLE_DIFFUSION.schedules)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_euler_ancestral_equals_diffusers(schedule: str, steps: int) -> None:
    plan = plan_sampling(
        STABLE_DIFFUSION, latent_shape=SHAPE[1:], sampler="euler_ancestral", schedule=schedule, steps=steps
    )
    scheduler = with_noise_levels_of(plan, EulerAncestralDiscreteScheduler(**BETAS))
    assert_same_trajectory(our_trajectory(plan), diffusers_trajectory(plan, scheduler, variance_exploding))


@pytest.mark.parametrize("schedule", STABLE_DIFFUSION.schedules)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_dpmpp_2m_equals_diffusers(schedule: str, steps: int) -> None:
    plan = plan_sampling(STABLE_DIFFUSION, latent_shape=SHAPE[1:], sampler="dpmpp_2m", schedule=schedule, steps=steps)
    scheduler = with_noise_levels_of(plan, DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="zero"))
    assert_same_trajectory(our_trajectory(plan), diffusers_trajectory(plan, scheduler, variance_preserving))


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddim_equals_diffusers_on_its_own_timesteps(eta: float, spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.numpy().astype(np.float64)
    sigmas = (*NOISE.sigmas_at(timesteps).tolist(), 0.0)
    plan = SamplingPlan("ddim", sigmas, (1.0,) * len(sigmas), tuple(timesteps.tolist()), {"eta": eta})
    assert_same_trajectory(our_trajectory(plan), diffusers_trajectory(plan, scheduler, variance_preserving, eta=eta))
