import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.guidance import classifier_free_guidance, guidance_rows
from services.denoiser.sampling.variance_preserving import denoised_from_epsilon


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_only_a_scale_above_one_needs_the_negative_prompt(scale: float, rows: int) -> None:
    assert guidance_rows(scale) == rows


def test_scale_one_is_the_positive_prediction_and_scale_zero_the_negative() -> None:
    positive, negative = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5])
    assert torch.equal(classifier_free_guidance(positive, negative, 1.0), positive)
    assert torch.equal(classifier_free_guidance(positive, negative, 0.0), negative)


@given(scale=st.floats(1.0, 20.0), sigma=st.floats(0.03, 15.0))
def test_guiding_epsilon_guides_denoised(scale: float, sigma: float) -> None:
    x, positive, negative = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).double().unbind()
    guided = sigma * classifier_free_guidance(positive, negative, scale).double()
    denoised = [denoised_from_epsilon(x, epsilon, sigma) for epsilon in (positive, negative)]
    torch.testing.assert_close(
        x - guided, denoised[1] + scale * (denoised[0] - denoised[1]), rtol=1e-5, atol=1e-5 * sigma * scale
    )


def test_half_precision_predictions_are_guided_in_float32() -> None:
    positive, negative = torch.tensor([1.001]).half(), torch.tensor([1.0]).half()
    guided = classifier_free_guidance(positive, negative, 7.5)
    assert guided.dtype == torch.float32
    assert guided.item() == pytest.approx(1.0 + 7.5 * (positive.item() - 1.0), rel=1e-7)
