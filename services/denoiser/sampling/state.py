"""Where a request stands between two steps, and its bytes, so that another process can go on from there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Everything that changes while a request is sampled; the rest is in its plan and its seed.

    latents: float32 [1, C, ...] at the noise level sigmas[level] of the plan; what the next model call sees.
    step_index: steps done.
    history: what the sampler kept of earlier calls, shaped like the latents.
    noise_draws: draws taken from the request's noise source; the next draw has this number.
    calls: model calls done of a step that takes several.
    """

    latents: Tensor
    step_index: int
    history: tuple[Tensor, ...]
    noise_draws: int
    calls: int = 0

    @property
    def level(self) -> int:
        """Where the latents are in the plan's noise levels: a further call of a step sees where the step goes to."""
        return self.step_index + self.calls


def state_size(state: SamplerState) -> int:
    """Bytes of the state's tensors."""
    return sum(tensor.nbytes for tensor in (state.latents, *state.history))


def state_on(state: SamplerState, device: torch.device) -> SamplerState:
    """The state with its tensors on a device; those that lie there already are not copied."""
    history = tuple(tensor.to(device) for tensor in state.history)
    return replace(state, latents=state.latents.to(device), history=history)


def state_to_bytes(state: SamplerState) -> bytes:
    """The state as a safetensors file, exact to the bit, from any device."""
    tensors = {
        "latents": state.latents,
        "position": torch.tensor([state.step_index, state.noise_draws, state.calls]),
        **{f"history.{i}": tensor for i, tensor in enumerate(state.history)},
    }
    data: bytes = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return data


def state_from_bytes(data: bytes, device: torch.device | str = "cpu") -> SamplerState:
    """The inverse of `state_to_bytes`, with its tensors on `device`; raises ValueError for other bytes."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        latents, position = tensors.pop("latents").to(device), tensors.pop("position")
        if position.dtype != torch.int64:
            raise ValueError(f"position is {position.dtype}")
        step_index, noise_draws, calls = position.tolist()
        history = tuple(tensors[f"history.{i}"].to(device) for i in range(len(tensors)))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError("these bytes are not a serialised sampler state") from error
    return SamplerState(latents, step_index, history, noise_draws, calls)
