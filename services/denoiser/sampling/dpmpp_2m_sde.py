"""DPM-Solver++(2M) SDE: the second-order multistep solver of the reverse SDE, in data prediction."""

from __future__ import annotations

from math import exp, expm1, sqrt

from torch import Tensor

from services.denoiser.sampling.dpmpp_2m import extrapolated
from services.denoiser.sampling.step import StepInputs, StepOutput


def sde_step(step: StepInputs, denoised: Tensor) -> tuple[Tensor, float]:
    """Mean and deviation after a step of the reverse SDE in which the x0 prediction stays `denoised`.

    With noise scaled by eta and h' = (1 + eta) h, the exact solution has the mean
    sigma' / sigma e^(-eta h) x + alpha' (1 - e^(-h')) denoised and the deviation sigma' sqrt(1 - e^(-2 eta h))
    (Lu et al. 2022, SDE-DPM-Solver++, where eta is 1).
    """
    (sigma, sigma_next), eta = step.sigma_pair, step.parameters["eta"]
    noise_h = eta * step.h() if eta > 0 else 0.0  # h may be infinite
    weight = -step.plan.alphas[step.i + 1] * expm1(-step.h() - noise_h)
    mean = sigma_next / sigma * exp(-noise_h) * step.x + weight * denoised
    return mean, sigma_next * sqrt(-expm1(-2 * noise_h))


def dpmpp_2m_sde(step: StepInputs) -> StepOutput:
    """k-diffusion's `sample_dpmpp_2m_sde`, midpoint rule, with independent noise where that has a Brownian tree."""
    mean, deviation = sde_step(step, extrapolated(step))
    return StepOutput(mean, deviation, history=(step.denoised,))
