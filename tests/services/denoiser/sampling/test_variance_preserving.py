from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.sampling.variance_preserving import VariancePreserving

NOISE = VariancePreserving()
SD15_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}


def test_training_sigmas_equal_the_formula_to_the_rounding_of_float32() -> None:
    survival, expected = 1.0, []
    for k in range(1000):
        survival *= 1 - (0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        expected.append(((1 - survival) / survival) ** 0.5)
    np.testing.assert_allclose(NOISE.sigmas_at(np.arange(1000.0)), expected, rtol=1.5e-5)


def test_published_ends_of_stable_diffusion() -> None:
    assert NOISE.sigma_min == pytest.approx(0.0291675, rel=2e-6)
    assert NOISE.sigma_max == pytest.approx(14.6146, rel=1e-5)


@given(st.floats(0.0, 999.0))
def test_timestep_to_sigma_and_back(timestep: float) -> None:
    there = NOISE.sigmas_at(np.array([timestep]))
    assert NOISE.timesteps_at(there).item() == pytest.approx(timestep, rel=1e-9, abs=1e-9)


@given(st.floats(NOISE.sigma_min, NOISE.sigma_max))
def test_sigma_to_timestep_and_back(sigma: float) -> None:
    there = NOISE.timesteps_at(np.array([sigma]))
    assert NOISE.sigmas_at(there).item() == pytest.approx(sigma, rel=1e-12)


def test_sigmas_outside_the_trained_range_clamp_to_its_ends() -> None:
    assert NOISE.timesteps_at(np.array([0.001, 100.0])).tolist() == [0.0, 999.0]


def test_a_scheduler_config_names_the_betas() -> None:
    config = SD15_CONFIG | {"beta_end": 0.02, "num_train_timesteps": 500}
    assert VariancePreserving.from_config(SD15_CONFIG) == NOISE
    assert VariancePreserving.from_config(config) == VariancePreserving(beta_end=0.02, num_train_timesteps=500)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta_schedule", "squaredcos_cap_v2"), ("trained_betas", [0.1])],
)
def test_a_config_with_other_betas_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        VariancePreserving.from_config(SD15_CONFIG | {key: value})


def test_a_config_without_beta_schedule_means_linear_and_is_refused() -> None:
    config = {key: value for key, value in SD15_CONFIG.items() if key != "beta_schedule"}
    with pytest.raises(ValueError, match="'linear'"):
        VariancePreserving.from_config(config)
