"""Sampling as a state machine: (plan, state, model output) -> next state.

The engine owns the loop. For each request and step it reads sigma and timestep from the plan, runs the network on a
batch that may mix requests, turns its output into `denoised`, and calls `advance`. Nothing here knows the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from services.denoiser.sampling.ddim import ddim_step
from services.denoiser.sampling.dpmpp_2m import dpmpp_2m_step
from services.denoiser.sampling.euler import euler_step
from services.denoiser.sampling.euler_ancestral import euler_ancestral_step
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.parameters import Parameter
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.state import SamplerState


@dataclass(frozen=True, eq=False)
class StepInputs:
    """All that a sampler may look at in one step: the plan's numbers, the state's tensors, the model's output."""

    plan: SamplingPlan
    state: SamplerState
    denoised: Tensor

    @property
    def x(self) -> Tensor:
        """The latents that this step starts from."""
        return self.state.latents

    @property
    def sigma_pair(self) -> tuple[float, float]:
        """The noise levels that this step goes from and to."""
        i = self.state.step_index
        return self.plan.sigmas[i], self.plan.sigmas[i + 1]


@dataclass(frozen=True)
class Sampler:
    """A named sampler. `step` returns the mean and the standard deviation of the next latent.

    history_length: how many earlier denoised predictions `step` looks back on, at most.
    """

    step: Callable[[StepInputs], tuple[Tensor, float]]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    history_length: int = 0


_EULER = Sampler(lambda s: (euler_step(s.x, s.denoised, *s.sigma_pair), 0.0))

SAMPLERS: dict[str, Sampler] = {
    "euler": _EULER,
    "flow_match_euler": _EULER,
    "euler_ancestral": Sampler(
        lambda s: euler_ancestral_step(s.x, s.denoised, *s.sigma_pair, **s.plan.parameters),
        {"eta": Parameter(1.0, low=0.0, high=1.0)},
    ),
    "ddim": Sampler(
        lambda s: ddim_step(s.x, s.denoised, *s.sigma_pair, **s.plan.parameters),
        {"eta": Parameter(0.0, low=0.0, high=1.0)},
    ),
    "dpmpp_2m": Sampler(
        lambda s: (dpmpp_2m_step(s.x, s.denoised, s.state.history, s.plan, s.state.step_index), 0.0),
        history_length=1,
    ),
}


def initial_state(latents: Tensor) -> SamplerState:
    """The state before the first step. latents: at the plan's first noise level, of draw 0 of the request's noise."""
    return SamplerState(latents=latents, step_index=0, history=(), noise_draws=1)


def is_done(plan: SamplingPlan, state: SamplerState) -> bool:
    """True once the latents are free of noise."""
    return state.step_index == len(plan.timesteps)


def advance(plan: SamplingPlan, state: SamplerState, denoised: Tensor, noise_source: NoiseSource) -> SamplerState:
    """One step. denoised: the x0 prediction at the state's noise level, float32, shape and device of its latents.

    Draws noise only for a step that adds some, on the CPU. Raises ValueError if the state is done already.
    """
    if is_done(plan, state):
        raise ValueError(f"all {state.step_index} steps are done")
    sampler = SAMPLERS[plan.sampler]
    latents, deviation = sampler.step(StepInputs(plan, state, denoised))
    draws = state.noise_draws
    if deviation > 0:
        latents = latents + deviation * noise_source.draw(draws).to(latents.device)
        draws += 1
    history = (denoised, *state.history)[: sampler.history_length]
    return SamplerState(latents, state.step_index + 1, history, draws)
