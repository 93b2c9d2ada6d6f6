from collections.abc import Callable
from math import sqrt
from typing import TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.denoiser.sampling.noise_process import NoiseProcess, noised
from services.denoiser.sampling.rectified_flow import RectifiedFlow
from services.denoiser.sampling.variance_preserving import VariancePreserving

EPSILON, V = VariancePreserving(), VariancePreserving(prediction="v_prediction")
FLOW = RectifiedFlow()

Truth: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""(x0, noise, sigma) -> what a perfect network predicts."""

TRUTHS: list[tuple[NoiseProcess, Truth]] = [
    (EPSILON, lambda x0, noise, sigma: noise),
    (V, lambda x0, noise, sigma: (noise - sigma * x0) / sqrt(1 + sigma**2)),
    (FLOW, lambda x0, noise, sigma: noise - x0),
]


def clean_and_noise(elements: int = 256) -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, elements, generator=torch.Generator().manual_seed(0)).unbind()
    return clean, noise


@pytest.mark.parametrize(("process", "truth"), TRUTHS)
@given(share=st.floats(0.0, 1.0))
def test_a_perfect_prediction_gives_back_the_clean_latent(process: NoiseProcess, truth: Truth, share: float) -> None:
    sigma = process.sigma_min + share * (process.sigma_max - process.sigma_min)
    clean, noise = clean_and_noise()
    denoised = process.denoised(noised(process, clean, noise, sigma), truth(clean, noise, sigma), sigma)
    torch.testing.assert_close(denoised, clean, rtol=1e-5, atol=2e-6 * (1 + sigma))


@given(st.floats(0.0, 15.0))
def test_the_input_of_a_variance_preserving_model_has_unit_variance(sigma: float) -> None:
    x = noised(EPSILON, *clean_and_noise(20_000), sigma)
    assert EPSILON.model_input(x, sigma).var().item() == pytest.approx(1.0, abs=0.05)


def test_a_flow_model_sees_its_latents_as_they_are() -> None:
    x, _ = clean_and_noise()
    assert torch.equal(FLOW.model_input(x, 0.5), x)


@pytest.mark.parametrize("process", [EPSILON, V, FLOW])
def test_a_half_precision_prediction_is_applied_in_float32(process: NoiseProcess) -> None:
    x, prediction = clean_and_noise()
    denoised = process.denoised(x, prediction.half(), 0.1)
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, process.denoised(x, prediction.half().float(), 0.1))


@pytest.mark.parametrize("process", [EPSILON, FLOW])
def test_without_a_picture_sampling_begins_with_nothing_but_noise(process: NoiseProcess) -> None:
    _, noise = clean_and_noise()
    assert torch.equal(
        process.pure_noise(noise, process.sigma_max), noised(process, 0 * noise, noise, process.sigma_max)
    )


@pytest.mark.parametrize("process", [EPSILON, FLOW])
@given(sigma=st.floats(1e-3, 15.0), ratio=st.floats(0.0, 1.0))
def test_a_first_order_step_has_one_formula_for_both_processes(
    process: NoiseProcess, sigma: float, ratio: float
) -> None:
    """Exact for a perfect denoiser: sigma' / sigma x + (1 - sigma' / sigma) x0 is x0 at the next noise level."""
    sigma = min(sigma, process.sigma_max)
    weight_of_x0 = process.alpha(ratio * sigma) - process.alpha(sigma) * ratio
    assert weight_of_x0 == pytest.approx(1 - ratio, abs=1e-12)
