"""DPM-Solver++(2M): the second-order multistep solver in data prediction."""

from __future__ import annotations

from math import isinf

from torch import Tensor

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def extrapolated(step: StepInputs) -> Tensor:
    """The prediction D_i of Lu et al. 2022 (DPM-Solver++), Algorithm 2, whose 1 / (2 r_i) is h / (2 h_last).

    history[0] is the denoised prediction of the step before. The first step has nothing to extrapolate from, and the
    step to sigma 0 has infinite h: both are first order.
    """
    if not step.history or isinf(step.h()):
        return step.denoised
    return step.denoised + step.h() / (2 * step.h(back=1)) * (step.denoised - step.history[0])


def dpmpp_2m(step: StepInputs) -> StepOutput:
    """DPM++ 2M: an Euler step on the extrapolated prediction."""
    return StepOutput(euler_step(step.x, extrapolated(step), *step.sigma_pair), history=(step.denoised,))
