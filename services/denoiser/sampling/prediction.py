"""Epsilon prediction seen from variance-exploding space: what goes into the network and what comes out."""

from __future__ import annotations

from math import sqrt

from torch import Tensor


def scale_model_input(x: Tensor, sigma: float) -> Tensor:
    """x / sqrt(sigma^2 + 1): the unit-variance input that the network was trained on (Karras et al. 2022, c_in)."""
    return x / sqrt(sigma**2 + 1.0)


def denoised_from_epsilon(x: Tensor, epsilon: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma * epsilon (Karras et al. 2022, Table 1, VP column: c_skip 1, c_out -sigma).

    x: the unscaled latent, float32. epsilon: the network's prediction in any dtype. Computed in x's dtype.
    """
    return x - sigma * epsilon.to(x.dtype)
