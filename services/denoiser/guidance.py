"""Classifier-free guidance (Ho and Salimans 2022).

Applied to the network's prediction, before it becomes a denoised latent. The combination is affine, and denoised is
affine in the prediction, so guiding the denoised latents instead would be the same up to rounding.
"""

from __future__ import annotations

from torch import Tensor


def guidance_rows(scale: float) -> int:
    """Rows of the model's batch that a request needs: 1 (the positive prompt) up to scale 1, else 2 (and the negative).

    Scales below 1 would weigh the prompt down; like scale 1 they mean no guidance.
    """
    return 2 if scale > 1.0 else 1


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale * (positive - negative), in float32 because a half-precision difference loses its digits.

    Ho and Salimans 2022, eq. 6 with w = scale - 1. positive, negative: predictions of one shape, any float dtype.
    """
    return negative.float() + scale * (positive.float() - negative.float())
