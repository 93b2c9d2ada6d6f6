"""The discrete diffusion of Stable Diffusion, seen from variance-exploding space.

A model trained with the variance preserving x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4) sees
the same picture divided by sqrt(abar_t): x = x0 + sigma noise (Karras et al. 2022, section 2), where
sigma_t = sqrt((1 - abar_t) / abar_t). So alpha is 1, and only the network's input is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.denoiser.sampling.noise_process import Float64Array

# Keys of a diffusers scheduler_config.json that would change the betas: (value if absent, the value we compute).
_FIXED_BETA_OPTIONS: dict[str, tuple[object, object]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None, None),
}
_LEAST_SURVIVAL = 2.0**-24  # of zero terminal SNR, as in diffusers: sigma is 4096 in place of infinity


def denoised_from_epsilon(x: Tensor, epsilon: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma * epsilon (Karras et al. 2022, Table 1, VP column: c_skip 1, c_out -sigma)."""
    return x - sigma * epsilon


def denoised_from_v(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """x0 of v = sqrt(abar) noise - sqrt(1 - abar) x0, abar = 1 / (sigma^2 + 1) (Salimans and Ho 2022, appendix D)."""
    return x / (sigma**2 + 1.0) - sigma / sqrt(sigma**2 + 1.0) * v


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "epsilon": denoised_from_epsilon,
    "v_prediction": denoised_from_v,
}
"""From a network's prediction to x0, by diffusers' name of what it predicts."""


@dataclass(frozen=True, kw_only=True)
class VariancePreserving:
    """Scaled-linear betas (Rombach et al. 2022); the defaults are those of Stable Diffusion 1.x and SDXL.

    Everything after the training sigmas is float64. prediction: a name in PREDICTIONS. zero_terminal_snr: the betas are
    rescaled so that the last timestep is noise alone (Lin et al. 2024, Algorithm 1, arXiv 2305.08891).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VariancePreserving:
        """Read a diffusers `scheduler_config.json`.

        Raises ValueError if its betas are not scaled-linear ones or its prediction type is not in PREDICTIONS, KeyError
        if it does not give the betas.
        """
        for key, (absent, supported) in _FIXED_BETA_OPTIONS.items():
            found = config.get(key, absent)
            if found != supported:
                raise ValueError(f"scheduler config: {key} is {found!r}, only {supported!r} is supported")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            choices = " or ".join(map(repr, PREDICTIONS))
            raise ValueError(f"scheduler config: prediction_type is {prediction!r}, must be {choices}")
        return cls(
            beta_start=float(config["beta_start"]),
            beta_end=float(config["beta_end"]),
            num_train_timesteps=int(config["num_train_timesteps"]),
            prediction=prediction,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )

    @cached_property
    def log_sigmas(self) -> Float64Array:
        """[num_train_timesteps], ascending: the logarithm of each training timestep's sigma.

        The betas and their products are float32, as in every reference implementation: 1 - abar loses two digits at
        timestep 0, which moves sigma_min by 1.3e-5 of itself, and published pictures were made with that sigma_min.
        """
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps, dtype=torch.float32)
        survival = torch.cumprod(1.0 - roots**2, dim=0)
        if self.zero_terminal_snr:
            survival = _with_zero_terminal_snr(survival)
        alphas_cumprod = survival.double().numpy()
        return np.asarray(0.5 * np.log((1.0 - alphas_cumprod) / alphas_cumprod), dtype=np.float64)

    @property
    def sigma_min(self) -> float:
        """The sigma of timestep 0."""
        return float(np.exp(self.log_sigmas[0]))

    @property
    def sigma_max(self) -> float:
        """The sigma of the last training timestep."""
        return float(np.exp(self.log_sigmas[-1]))

    def alpha(self, sigma: float) -> float:
        """1: in variance-exploding space x0 keeps its weight."""
        return 1.0

    def sigmas_at(self, timesteps: Float64Array) -> Float64Array:
        """[n] fractional timesteps -> [n] sigmas, log sigma being linear between timesteps (as in k-diffusion)."""
        return np.exp(np.interp(timesteps, self._timesteps, self.log_sigmas))

    def timesteps_at(self, sigmas: Float64Array) -> Float64Array:
        """[n] sigmas > 0 -> [n] fractional timesteps, the inverse of `sigmas_at`, clamped to the trained range."""
        return np.interp(np.log(sigmas), self.log_sigmas, self._timesteps)

    def pure_noise(self, noise: Tensor, sigma: float) -> Tensor:
        """sigma * noise."""
        return sigma * noise

    def model_input(self, x: Tensor, sigma: float) -> Tensor:
        """x / sqrt(sigma^2 + 1): the unit-variance input that the network was trained on (Karras et al. 2022, c_in)."""
        return x / sqrt(sigma**2 + 1.0)

    def denoised(self, x: Tensor, prediction: Tensor, sigma: float) -> Tensor:
        """x0 by the network's prediction in any dtype, computed in x's, float32."""
        return PREDICTIONS[self.prediction](x, prediction.to(x.dtype), sigma)

    @property
    def _timesteps(self) -> Float64Array:
        return np.arange(self.num_train_timesteps, dtype=np.float64)


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Roots of abar shifted to end in 0 and scaled to begin as before, by way of the betas, as diffusers rounds."""
    roots = alphas_cumprod.sqrt()
    rescaled = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    betas = 1.0 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    survival = torch.cumprod(1.0 - betas, dim=0)
    survival[-1] = _LEAST_SURVIVAL
    return survival
