"""UniPC: a multistep predictor, and a corrector that uses the next step's model call."""

from __future__ import annotations

from math import expm1

from torch import Tensor

from services.denoiser.sampling.dpmpp_2m import extrapolated
from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def unipc(step: StepInputs) -> StepOutput:
    """One step of UniPC-2 in data prediction with B(h) = e^h - 1 (Zhao et al. 2023, `bh2`, the reference's default).

    history: the denoised prediction of the step before, the latents that it went from, and the prediction before it.
    Corrects the latents that the last step predicted, now that the model has seen them, then predicts the next ones.
    The predictor of order 2 with its coefficient 1/2 is DPM++ 2M's.
    """
    x = _corrected(step) if step.history else step.x
    x_next = euler_step(x, extrapolated(step), *step.sigma_pair)
    return StepOutput(x_next, history=(step.denoised, x, *step.history[:1]))


def _corrected(step: StepInputs) -> Tensor:
    """The latents at this step again, by UniC of order 1 after the first step and of order 2 after later ones."""
    last, x_last, *earlier = step.history
    h = step.h(back=1)
    weight = -step.plan.alphas[step.i] * expm1(-h)
    if not earlier:
        mean = last + 0.5 * (step.denoised - last)
    else:
        r = -step.h(back=2) / h
        older, newer = _corrector_weights(h, r)
        mean = last + older / r * (earlier[0] - last) + newer * (step.denoised - last)
    return step.plan.sigmas[step.i] / step.plan.sigmas[step.i - 1] * x_last + weight * mean


def _corrector_weights(h: float, r: float) -> tuple[float, float]:
    """The weights (rho) of the differences of x0 at the offsets r and 1, in units of h.

    They solve older r^k + newer = b_k for k = 0 and 1, the exact integrals of linear and quadratic terms over B(h).
    """
    phi_1 = expm1(-h)
    phi_2 = phi_1 / -h - 1
    b_0, b_1 = phi_2 / phi_1, 2 * (phi_2 / -h - 0.5) / phi_1
    older = (b_0 - b_1) / (1 - r)
    return older, b_0 - older
