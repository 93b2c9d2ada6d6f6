"""DEIS: the second-order multistep solver that extrapolates epsilon in the logarithm of rho = sigma / alpha."""

from __future__ import annotations

from math import exp, isinf, log

from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.step import StepInputs, StepOutput


def deis(step: StepInputs) -> StepOutput:
    """One step of DEIS with two epsilons (Zhang and Chen 2023, rho-AB, its polynomial in log rho as in diffusers).

    d(x / alpha) = epsilon d(rho), integrated over the line through the last two epsilons: Euler's step, where epsilon
    is constant, and what the difference adds. First order are the first step, the second one from pure noise, where rho
    was infinite, and the step to sigma 0, where log rho is.
    """
    alphas, lambdas, i = step.plan.alphas, step.plan.lambdas, step.i
    epsilon = (step.x - alphas[i] * step.denoised) / step.plan.sigmas[i]
    x_next = euler_step(step.x, step.denoised, *step.sigma_pair)
    if step.history and not isinf(step.h()) and not isinf(step.h(back=1)):
        rho_last, rho, rho_next = (exp(-half_log_snr) for half_log_snr in lambdas[i - 1 : i + 2])
        x_next = x_next + alphas[i + 1] * _line_integral(rho, rho_next, rho_last) * (step.history[0] - epsilon)
    return StepOutput(x_next, history=(epsilon,))


def _line_integral(rho: float, rho_next: float, rho_last: float) -> float:
    """The integral from rho to rho_next, over rho, of the line in log rho that is 0 at rho and 1 at rho_last."""
    ratio = rho_next / rho
    return rho * (ratio * (log(ratio) - 1) + 1) / log(rho_last / rho)
