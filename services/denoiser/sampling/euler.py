"""Euler's method on the probability-flow ODE."""

from __future__ import annotations

from torch import Tensor

from services.denoiser.sampling.step import StepInputs, StepOutput


def euler_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One step from `sigma` > 0 to `sigma_next` (Karras et al. 2022, Algorithm 1 without its second-order correction).

    x, denoised: float32, the latent at `sigma` and the model's x0 prediction there. Written as an interpolation
    between the two, so that the step to sigma 0 returns `denoised` exactly.

    It is a rectified flow's step too, x + (sigma_next - sigma) * velocity, where velocity = (x - denoised) / sigma.
    """
    return denoised + (sigma_next / sigma) * (x - denoised)


def euler(step: StepInputs) -> StepOutput:
    """Euler, and flow-match Euler."""
    return StepOutput(euler_step(step.x, step.denoised, *step.sigma_pair))
