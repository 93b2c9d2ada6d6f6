"""Heun's method on the probability-flow ODE: two model calls a step."""

from __future__ import annotations

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def heun(step: StepInputs) -> StepOutput:
    """Heun, and flow-match Heun (Karras et al. 2022, Algorithm 1).

    The first call takes an Euler step and keeps where it came from, the second replaces its slope dx/dsigma by the mean
    of the slopes at both ends. The step to sigma 0, where there is no slope, is the Euler step.
    """
    sigma, sigma_next = step.sigma_pair
    if sigma_next == 0:
        return StepOutput(euler_step(step.x, step.denoised, sigma, sigma_next))
    if not step.history:
        x_next = euler_step(step.x, step.denoised, sigma, sigma_next)
        return StepOutput(x_next, history=(step.x, step.denoised), ends_step=False)
    x, denoised = step.history
    slope = 0.5 * ((x - denoised) / sigma + (step.x - step.denoised) / sigma_next)
    return StepOutput(x + (sigma_next - sigma) * slope)
