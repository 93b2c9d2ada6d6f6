"""The noise levels that an epsilon model was trained on, and the map between noise level and timestep.

Space: variance exploding, x = x0 + sigma * noise (Karras et al. 2022, section 2). A model trained with the variance
preserving x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4) sees the same picture divided by
sqrt(abar_t), hence sigma_t = sqrt((1 - abar_t) / abar_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

# Keys of a diffusers scheduler_config.json that would change the betas: (value if absent, the value we compute).
_FIXED_BETA_OPTIONS: dict[str, tuple[object, object]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Scaled-linear betas (Rombach et al. 2022); the defaults are those of Stable Diffusion 1.x and SDXL.

    Everything after the training sigmas is float64.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers `scheduler_config.json`.

        Raises ValueError if its betas are not scaled-linear ones, KeyError if it does not give them.
        """
        for key, (absent, supported) in _FIXED_BETA_OPTIONS.items():
            found = config.get(key, absent)
            if found != supported:
                raise ValueError(f"scheduler config: {key} is {found!r}, only {supported!r} is supported")
        return cls(
            beta_start=float(config["beta_start"]),
            beta_end=float(config["beta_end"]),
            num_train_timesteps=int(config["num_train_timesteps"]),
        )

    @cached_property
    def log_sigmas(self) -> Float64Array:
        """[num_train_timesteps], ascending: the logarithm of each training timestep's sigma.

        The betas and their products are float32, as in every reference implementation: 1 - abar loses two digits at
        timestep 0, which moves sigma_min by 1.3e-5 of itself, and published pictures were made with that sigma_min.
        """
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps, dtype=torch.float32)
        alphas_cumprod = torch.cumprod(1.0 - roots**2, dim=0).double().numpy()
        return np.asarray(0.5 * np.log((1.0 - alphas_cumprod) / alphas_cumprod), dtype=np.float64)

    @property
    def sigma_min(self) -> float:
        """The sigma of timestep 0."""
        return float(np.exp(self.log_sigmas[0]))

    @property
    def sigma_max(self) -> float:
        """The sigma of the last training timestep."""
        return float(np.exp(self.log_sigmas[-1]))

    def sigmas_at(self, timesteps: Float64Array) -> Float64Array:
        """[n] fractional timesteps -> [n] sigmas, log sigma being linear between timesteps (as in k-diffusion)."""
        return np.exp(np.interp(timesteps, self._timesteps, self.log_sigmas))

    def timesteps_at(self, sigmas: Float64Array) -> Float64Array:
        """[n] sigmas > 0 -> [n] fractional timesteps, the inverse of `sigmas_at`, clamped to the trained range."""
        return np.interp(np.log(sigmas), self.log_sigmas, self._timesteps)

    @property
    def _timesteps(self) -> Float64Array:
        return np.arange(self.num_train_timesteps, dtype=np.float64)
