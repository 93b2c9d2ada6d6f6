"""DPM-Solver++(2M): the second-order multistep solver in data prediction."""

from __future__ import annotations

from math import isinf

from torch import Tensor

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.plan import SamplingPlan


def dpmpp_2m_step(x: Tensor, denoised: Tensor, history: tuple[Tensor, ...], plan: SamplingPlan, i: int) -> Tensor:
    """Step i, from sigmas[i] to sigmas[i + 1] (Lu et al. 2022, DPM-Solver++, Algorithm 2).

    history: the denoised prediction of step i - 1, empty at the first step. The algorithm's 1 / (2 r_i) is
    `h / (2 * h_last)`, and its update is an Euler step on the extrapolated prediction D_i. The first step has nothing
    to extrapolate from; the step to sigma 0 has infinite h: both are first order.
    """
    h = plan.lambdas[i + 1] - plan.lambdas[i]
    if history and not isinf(h):
        h_last = plan.lambdas[i] - plan.lambdas[i - 1]
        denoised = denoised + h / (2 * h_last) * (denoised - history[0])
    return euler_step(x, denoised, plan.sigmas[i], plan.sigmas[i + 1])
