"""DPM-Solver++(2M): the second-order multistep solver in data prediction."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from torch import Tensor

from services.denoiser.sampling.euler import euler_step


def dpmpp_2m_step(x: Tensor, denoised: Tensor, history: tuple[Tensor, ...], sigmas: Sequence[float], i: int) -> Tensor:
    """Step i, from sigmas[i] to sigmas[i + 1] (Lu et al. 2022, DPM-Solver++, Algorithm 2).

    history: the denoised prediction of step i - 1, empty at the first step. With lambda = -log(sigma), the algorithm's
    1 / (2 r_i) is `h / (2 * h_last)`, and its update is an Euler step on the extrapolated prediction D_i. The first
    step has nothing to extrapolate from; the step to sigma 0 has infinite h: both are first order.
    """
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    if history and sigma_next > 0:
        h, h_last = log(sigma / sigma_next), log(sigmas[i - 1] / sigma)
        denoised = denoised + h / (2 * h_last) * (denoised - history[0])
    return euler_step(x, denoised, sigma, sigma_next)
