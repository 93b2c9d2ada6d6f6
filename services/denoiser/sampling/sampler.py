"""Sampling as a state machine: (plan, state, model output) -> next state.

The engine owns the loop. For each request it reads sigma and timestep of the state from the plan, runs the network on a
batch that may mix requests, turns its output into `denoised`, and calls `advance`. Nothing here knows the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from services.denoiser.sampling.ddim import ddim
from services.denoiser.sampling.ddpm import ddpm
from services.denoiser.sampling.deis import deis
from services.denoiser.sampling.dpmpp_2m import dpmpp_2m
from services.denoiser.sampling.dpmpp_2m_sde import dpmpp_2m_sde
from services.denoiser.sampling.dpmpp_3m_sde import dpmpp_3m_sde
from services.denoiser.sampling.euler import euler
from services.denoiser.sampling.euler_ancestral import euler_ancestral
from services.denoiser.sampling.heun import heun
from services.denoiser.sampling.lcm import lcm
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.parameters import Parameter
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.state import SamplerState
from services.denoiser.sampling.step import StepInputs, StepOutput
from services.denoiser.sampling.unipc import unipc


@dataclass(frozen=True)
class Sampler:
    """A named sampler.

    step: from a model call's output to the next latents.
    parameters: that it takes.
    kept: tensors that it keeps after 0, 1, 2, ... steps; after more than are listed, as many as the last says.
    kept_in_step: tensors that it keeps between the calls of one step.
    calls_per_step: model calls of a step; the one to sigma 0 takes one.
    """

    step: Callable[[StepInputs], StepOutput]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    kept: tuple[int, ...] = (0,)
    kept_in_step: int = 0
    calls_per_step: int = 1

    @property
    def longest_history(self) -> int:
        """Tensors of a state's history, at most."""
        return max(*self.kept, self.kept_in_step)

    def history_length(self, state: SamplerState) -> int:
        """Tensors of the state's history."""
        return self.kept_in_step if state.calls else self.kept[min(state.step_index, len(self.kept) - 1)]


def _eta(default: float) -> Mapping[str, Parameter]:
    """The share of the posterior's noise that each step adds."""
    return {"eta": Parameter(default, low=0.0, high=1.0)}


_EULER = Sampler(euler)
_HEUN = Sampler(heun, kept_in_step=2, calls_per_step=2)

SAMPLERS: dict[str, Sampler] = {
    "euler": _EULER,
    "euler_ancestral": Sampler(euler_ancestral, _eta(1.0)),
    "heun": _HEUN,
    "ddim": Sampler(ddim, _eta(0.0)),
    "ddpm": Sampler(ddpm),
    "dpmpp_2m": Sampler(dpmpp_2m, kept=(0, 1)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, _eta(1.0), kept=(0, 1)),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, _eta(1.0), kept=(0, 1, 2)),
    "deis": Sampler(deis, kept=(0, 1)),
    "unipc": Sampler(unipc, kept=(0, 2, 3)),
    "lcm": Sampler(lcm),
    "flow_match_euler": _EULER,
    "flow_match_heun": _HEUN,
}


def calls_per_step(samplers: Iterable[str]) -> dict[str, int]:
    """Model calls of a step, for each of the samplers that takes more than one."""
    return {name: SAMPLERS[name].calls_per_step for name in samplers if SAMPLERS[name].calls_per_step > 1}


def initial_state(latents: Tensor) -> SamplerState:
    """The state before the first step. latents: at the plan's first noise level, of draw 0 of the request's noise."""
    return SamplerState(latents=latents, step_index=0, history=(), noise_draws=1)


def is_done(plan: SamplingPlan, state: SamplerState) -> bool:
    """True once the latents are free of noise."""
    return state.step_index == len(plan.timesteps)


def calls_left(plan: SamplingPlan, state: SamplerState) -> int:
    """Model calls until `is_done`."""
    if is_done(plan, state):
        return 0
    return SAMPLERS[plan.sampler].calls_per_step * (len(plan.timesteps) - 1 - state.step_index) + 1 - state.calls


def advance(plan: SamplingPlan, state: SamplerState, denoised: Tensor, noise_source: NoiseSource) -> SamplerState:
    """What follows from a model call. denoised: its x0 prediction at the state's noise level, float32, shape and device
    of the latents.

    Draws noise only for a step that adds some, on the CPU. Raises ValueError if the state is done already.
    """
    if is_done(plan, state):
        raise ValueError(f"all {state.step_index} steps are done")
    output = SAMPLERS[plan.sampler].step(StepInputs(plan, state, denoised))
    if not output.ends_step:
        return SamplerState(output.latents, state.step_index, output.history, state.noise_draws, state.calls + 1)
    latents, draws = output.latents, state.noise_draws
    if output.deviation > 0:
        latents = latents + output.deviation * noise_source.draw(draws).to(latents.device)
        draws += 1
    return SamplerState(latents, state.step_index + 1, output.history, draws)
