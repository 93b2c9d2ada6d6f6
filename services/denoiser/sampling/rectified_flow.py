"""Rectified flow (Liu et al. 2022; Esser et al. 2024, section 2): straight lines from noise to data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.denoiser.sampling.noise_process import Float64Array


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x = (1 - sigma) x0 + sigma noise, sigma from 1 to 0; the network predicts the velocity dx/dsigma = noise - x0.

    It sees x as it is and is told sigma * num_train_timesteps.
    """

    num_train_timesteps: int = 1000

    @property
    def sigma_min(self) -> float:
        """The sigma of timestep 1."""
        return 1.0 / self.num_train_timesteps

    @property
    def sigma_max(self) -> float:
        """Pure noise."""
        return 1.0

    def alpha(self, sigma: float) -> float:
        """1 - sigma."""
        return 1.0 - sigma

    def sigmas_at(self, timesteps: Float64Array) -> Float64Array:
        """[n] timesteps, from 1 to num_train_timesteps, -> [n] sigmas."""
        return timesteps / self.num_train_timesteps

    def timesteps_at(self, sigmas: Float64Array) -> Float64Array:
        """[n] sigmas -> [n] timesteps, the inverse of `sigmas_at`."""
        return sigmas * self.num_train_timesteps

    def pure_noise(self, noise: Tensor, sigma: float) -> Tensor:
        """The noise itself, even where the first sigma is a little below 1 (Wan), as all reference implementations."""
        return noise

    def model_input(self, x: Tensor, sigma: float) -> Tensor:
        """The latents as they are."""
        return x

    def denoised(self, x: Tensor, prediction: Tensor, sigma: float) -> Tensor:
        """x0 = x - sigma * velocity."""
        return x - sigma * prediction.to(x.dtype)
