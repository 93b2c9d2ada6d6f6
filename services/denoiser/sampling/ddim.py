"""DDIM: implicit (eta 0) to fully stochastic (eta 1) sampling of the diffusion chain."""

from __future__ import annotations

from services.denoiser.sampling.euler_ancestral import ancestral_sigmas
from services.denoiser.sampling.step import StepInputs, StepOutput


def ddim(step: StepInputs) -> StepOutput:
    """One step of Song et al. 2021 (DDIM), eq. 12; variance-exploding space only.

    The paper's x_t is our x times sqrt(abar_t). Dividing eq. 12 by sqrt(abar_next) leaves x0 with weight 1 and turns
    the deviation of eq. 16 into sigma_up. At equal eta DDIM therefore is ancestral Euler; the two names differ in
    the eta that the field expects of them, 0 and 1.
    """
    sigma, sigma_next = step.sigma_pair
    sigma_down, sigma_up = ancestral_sigmas(sigma, sigma_next, step.parameters["eta"])
    epsilon = (step.x - step.denoised) / sigma
    return StepOutput(step.denoised + sigma_down * epsilon, sigma_up)
