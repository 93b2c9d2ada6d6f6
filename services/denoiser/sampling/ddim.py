"""DDIM: implicit (eta 0) to fully stochastic (eta 1) sampling of the diffusion chain."""

from __future__ import annotations

from torch import Tensor

from services.denoiser.sampling.euler_ancestral import ancestral_sigmas


def ddim_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float) -> tuple[Tensor, float]:
    """One step of Song et al. 2021 (DDIM), eq. 12: mean and standard deviation of the next latent.

    The paper's x_t is our x times sqrt(abar_t). Dividing eq. 12 by sqrt(abar_next) leaves x0 with weight 1 and turns
    the deviation of eq. 16 into sigma_up. At equal eta DDIM therefore is ancestral Euler; the two names differ in
    the eta that the field expects of them, 0 and 1.
    """
    sigma_down, sigma_up = ancestral_sigmas(sigma, sigma_next, eta)
    epsilon = (x - denoised) / sigma
    return denoised + sigma_down * epsilon, sigma_up
