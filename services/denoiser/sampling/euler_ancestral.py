"""Ancestral sampling with Euler steps: each step overshoots, then noise brings the latent back to the noise level."""

from __future__ import annotations

from math import sqrt

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def ancestral_sigmas(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split `sigma_next` into (sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = sigma_next^2.

    At eta 1, sigma_up is the standard deviation of the posterior q(x_next | x, x0) (Ho et al. 2020, eq. 7, in
    variance-exploding space); eta in [0, 1] scales it (Song et al. 2021, DDIM, eq. 16).
    """
    sigma_up = eta * sigma_next * sqrt(1.0 - (sigma_next / sigma) ** 2)
    return sqrt(sigma_next**2 - sigma_up**2), sigma_up


def euler_ancestral(step: StepInputs) -> StepOutput:
    """k-diffusion's `sample_euler_ancestral`; variance-exploding space only."""
    sigma, sigma_next = step.sigma_pair
    sigma_down, sigma_up = ancestral_sigmas(sigma, sigma_next, step.parameters["eta"])
    return StepOutput(euler_step(step.x, step.denoised, sigma, sigma_down), sigma_up)
