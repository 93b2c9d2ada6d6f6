"""What a sampler is given after each model call, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.state import SamplerState


@dataclass(frozen=True, eq=False)
class StepInputs:
    """The plan's numbers, the state's tensors, and the x0 prediction `denoised` that the model made of the latents."""

    plan: SamplingPlan
    state: SamplerState
    denoised: Tensor

    @property
    def i(self) -> int:
        """Steps done: this one goes from sigmas[i] to sigmas[i + 1]."""
        return self.state.step_index

    @property
    def x(self) -> Tensor:
        """The latents that the model saw."""
        return self.state.latents

    @property
    def history(self) -> tuple[Tensor, ...]:
        """What the sampler kept of earlier calls."""
        return self.state.history

    @property
    def sigma_pair(self) -> tuple[float, float]:
        """The noise levels that this step goes from and to."""
        return self.plan.sigmas[self.i], self.plan.sigmas[self.i + 1]

    @property
    def parameters(self) -> Mapping[str, float]:
        """A value for each parameter of the sampler."""
        return self.plan.parameters

    def h(self, back: int = 0) -> float:
        """lambda[i + 1] - lambda[i], or that of the step so many before: how far a step goes in half the log-SNR."""
        lambdas, end = self.plan.lambdas, self.i + 1 - back
        return lambdas[end] - lambdas[end - 1]


@dataclass(frozen=True, eq=False)
class StepOutput:
    """Where a sampler goes.

    latents: the mean of the next latents.
    deviation: the standard deviation of the noise that is added to them.
    history: what the sampler wants to see again at the next call, shaped like the latents.
    ends_step: False where the step needs another model call, of `latents`, at the noise level that the step goes to.
    """

    latents: Tensor
    deviation: float = 0.0
    history: tuple[Tensor, ...] = ()
    ends_step: bool = True
