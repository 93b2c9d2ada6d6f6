"""DDPM: ancestral sampling of the diffusion chain, whatever its steps skip."""

from __future__ import annotations

from math import sqrt

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def ddpm(step: StepInputs) -> StepOutput:
    """A draw of the posterior q(x_next | x, x0) (Ho et al. 2020, eqs. 6 and 7); variance-exploding space only.

    There the two Gaussians that it multiplies are x0 with variance sigma_next^2 and x with sigma^2 - sigma_next^2, so
    the mean lies the fraction (sigma_next / sigma)^2 of the way from x0 to x.
    """
    sigma, sigma_next = step.sigma_pair
    mean = euler_step(step.x, step.denoised, sigma**2, sigma_next**2)
    return StepOutput(mean, sigma_next * sqrt(1.0 - (sigma_next / sigma) ** 2))
