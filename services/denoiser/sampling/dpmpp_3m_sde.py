"""DPM-Solver++(3M) SDE: the third-order multistep solver of the reverse SDE, in data prediction."""

from __future__ import annotations

from math import expm1, isinf

from torch import Tensor

from services.denoiser.sampling.dpmpp_2m_sde import sde_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def dpmpp_3m_sde(step: StepInputs) -> StepOutput:
    """k-diffusion's `sample_dpmpp_3m_sde`, with independent noise where that has a Brownian tree.

    phi_2 and phi_3 are those of Lu et al. 2022 (DPM-Solver++), at (1 + eta) h. diffusers' third order of the SDE
    has the other sign of 1/2 in phi_3, which then does not vanish with h.
    """
    mean, deviation = sde_step(step, step.denoised)
    if step.history and not isinf(step.h()):
        h = (1 + step.parameters["eta"]) * step.h()
        phi_2 = expm1(-h) / h + 1
        phi_3 = phi_2 / h - 0.5
        slope, curvature = _differences(step)
        mean = mean + step.plan.alphas[step.i + 1] * (phi_2 * slope - phi_3 * curvature)
    return StepOutput(mean, deviation, history=(step.denoised, *step.history[:1]))


def _differences(step: StepInputs) -> tuple[Tensor, Tensor | float]:
    """Of the denoised predictions over lambda in units of h: the first at this step, and the second.

    With one earlier prediction there is no second; k-diffusion's second step then is second order.
    """
    earlier, r_0 = step.history, step.h(back=1) / step.h()
    first = (step.denoised - earlier[0]) / r_0
    if len(earlier) == 1:
        return first, 0.0
    r_1 = step.h(back=2) / step.h()
    second = (first - (earlier[0] - earlier[1]) / r_1) / (r_0 + r_1)
    return first + r_0 * second, second
