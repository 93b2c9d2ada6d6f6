import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.sampling.prediction import denoised_from_epsilon, scale_model_input


@given(st.floats(0.03, 15.0))
def test_the_true_noise_gives_back_the_clean_latent(sigma: float) -> None:
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(
        denoised_from_epsilon(clean + sigma * noise, noise, sigma), clean, rtol=1e-5, atol=1e-6 * (1 + sigma)
    )


@given(st.floats(0.0, 15.0))
def test_the_model_input_has_unit_variance(sigma: float) -> None:
    clean, noise = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).unbind()
    assert scale_model_input(clean + sigma * noise, sigma).var().item() == pytest.approx(1.0, abs=0.05)


def test_a_half_precision_prediction_is_applied_in_float32() -> None:
    epsilon = torch.randn(64, generator=torch.Generator().manual_seed(0)).half()
    denoised = denoised_from_epsilon(torch.zeros(64), epsilon, 0.1)
    assert torch.equal(denoised, -0.1 * epsilon.float())
