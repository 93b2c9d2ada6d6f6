"""How a model's latents are noised: x = alpha(sigma) x0 + sigma noise."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Float64Array = NDArray[np.float64]


class NoiseProcess(Protocol):
    """The noise that a network was trained to remove, and what it is told and predicts.

    Samplers see x in the process's own space, (alpha, sigma) of each noise level, and `denoised`, the network's
    prediction of x0. alpha' - alpha sigma' / sigma = 1 - sigma' / sigma for both processes here, so a first-order step
    is one formula; multistep solvers are written in lambda = log(alpha / sigma).
    """

    @property
    def sigma_min(self) -> float:
        """The smallest noise level that it was trained on."""
        ...

    @property
    def sigma_max(self) -> float:
        """The largest."""
        ...

    def alpha(self, sigma: float) -> float:
        """The weight of x0 at a noise level; 1 at sigma 0."""
        ...

    def sigmas_at(self, timesteps: Float64Array) -> Float64Array:
        """[n] fractional timesteps -> [n] sigmas."""
        ...

    def timesteps_at(self, sigmas: Float64Array) -> Float64Array:
        """[n] sigmas > 0 -> [n] fractional timesteps, as the network is told them."""
        ...

    def pure_noise(self, noise: Tensor, sigma: float) -> Tensor:
        """The latents that sampling begins with when there is nothing to begin from; noise: standard normal."""
        ...

    def model_input(self, x: Tensor, sigma: float) -> Tensor:
        """What the network sees of latents at a noise level."""
        ...

    def denoised(self, x: Tensor, prediction: Tensor, sigma: float) -> Tensor:
        """x0 by the network's prediction, which may be of any dtype. Computed in x's, float32."""
        ...


def noised(process: NoiseProcess, x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The latents that a picture's x0 has at a noise level: where sampling begins from a picture."""
    return process.alpha(sigma) * x0 + sigma * noise
