import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.sampling.noise_schedule import Float64Array, NoiseSchedule
from services.denoiser.sampling.parameters import resolve_parameters
from services.denoiser.sampling.schedules import SCHEDULES, exponential, karras, scaled_linear

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NOISE = NoiseSchedule()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

DIFFUSERS_RTOL = 1e-6
# The reference implementations, and so we, take 1 - abar in float32, which moves sigma_min by 1.3e-5 of itself.
FLOAT64_RTOL = 1.5e-5


def sigmas_of(schedule: str, steps: int) -> Float64Array:
    """The schedule with its default parameters."""
    chosen = SCHEDULES[schedule]
    return chosen.sigmas(NOISE, steps, **resolve_parameters(schedule, chosen.parameters, {}))


def diffusers_sigmas(steps: int, **options: bool) -> Float64Array:
    scheduler = EulerDiscreteScheduler(**BETAS, **options)
    scheduler.set_timesteps(steps)
    return np.asarray(scheduler.sigmas.numpy(), dtype=np.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(steps=st.integers(1, 300))
def test_every_schedule_falls_from_sigma_max_to_zero(schedule: str, steps: int) -> None:
    sigmas = sigmas_of(schedule, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == np.float64
    assert sigmas[0] == pytest.approx(NOISE.sigma_max, rel=1e-12)
    assert sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_goes_from_sigma_max_to_zero(schedule: str) -> None:
    np.testing.assert_allclose(sigmas_of(schedule, 1), [NOISE.sigma_max, 0.0], rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
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
