"""What is fixed before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, log


@dataclass(frozen=True)
class SamplingPlan:
    """The noise levels that a request visits. Python floats, exact wherever the plan travels.

    sampler: a name in SAMPLERS.
    sigmas: steps + 1 noise levels, strictly decreasing to 0.
    alphas: the weight of x0 at each of them.
    timesteps: for each step, the fractional training timestep that the network is told.
    parameters: a value for each parameter of the sampler.
    """

    sampler: str
    sigmas: tuple[float, ...]
    alphas: tuple[float, ...]
    timesteps: tuple[float, ...]
    parameters: Mapping[str, float]

    @cached_property
    def lambdas(self) -> tuple[float, ...]:
        """log(alpha / sigma) of each noise level, half its log-SNR: -inf where there is no signal, inf at sigma 0."""
        levels = zip(self.alphas, self.sigmas, strict=True)
        return tuple(-inf if alpha == 0 else inf if sigma == 0 else log(alpha / sigma) for alpha, sigma in levels)
