"""Going on from a checkpoint that another replica made, or this one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from safelight.errors import FieldViolation, FingerprintMismatchError, InvalidRequestError
from safelight.v1.work_pb2 import Checkpoint
from services.common.exchange import Payload, TensorReader
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.sampler import SAMPLERS
from services.denoiser.sampling.state import SamplerState, state_from_bytes

_FIELD = "resume_from.sampler_state"
_FLOAT_BYTES = 4
_OVERHEAD_BYTES = 4096  # of a serialised state beside its tensors


async def read_checkpoint(
    reader: TensorReader, checkpoint: Checkpoint, plan: SamplingPlan, latent_shape: Sequence[int], fingerprint: str
) -> SamplerState:
    """The state to go on from, on the CPU; `fingerprint` is that of this denoiser's weights.

    Raises:
        FingerprintMismatchError: a denoiser with other weights made it.
        InvalidRequestError: it is of another request, or no checkpoint at all.
        TensorCorruptError, LeaseExpiredError, StageUnavailableError: see `TensorReader.read`.
    """
    header = checkpoint.sampler_state.header
    if header.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"{_FIELD}: was made with the weights {header.fingerprint or 'of no fingerprint'}, this denoiser has "
            f"{fingerprint}: resume on a replica with the same weights, or start again",
            field=_FIELD,
            stage="denoiser",
        )
    largest = (1 + SAMPLERS[plan.sampler].longest_history) * prod(latent_shape) * _FLOAT_BYTES + _OVERHEAD_BYTES
    if len(header.shape) != 1 or header.shape[0] > largest:
        raise InvalidRequestError.of(_FIELD, f"has shape {list(header.shape)}; must be [bytes], at most {largest}")
    payload = await reader.read(checkpoint.sampler_state, _FIELD)
    return await asyncio.to_thread(_checked_state, payload, checkpoint.step, plan, (1, *latent_shape))


def _checked_state(payload: Payload, step: int, plan: SamplingPlan, shape: tuple[int, ...]) -> SamplerState:
    try:
        state = state_from_bytes(bytes(payload.buffer()))
    except ValueError as error:
        raise InvalidRequestError.of(_FIELD, f"{error}: start again from noise") from error
    if violations := list(_violations(state, step, plan, shape)):
        raise InvalidRequestError.of_all(violations)
    return state


def _violations(state: SamplerState, step: int, plan: SamplingPlan, shape: tuple[int, ...]) -> Iterator[FieldViolation]:
    """What makes the state one that the plan can't have led to."""
    steps, sampler = len(plan.timesteps), SAMPLERS[plan.sampler]
    if not 0 <= state.step_index < steps or state.step_index != step:
        yield FieldViolation(
            "resume_from.step", f"is {step}, the state's is {state.step_index}; both must be one of 0 to {steps - 1}"
        )
    if not 0 <= state.calls < (sampler.calls_per_step if state.step_index < steps - 1 else 1):
        yield FieldViolation(_FIELD, f"has made {state.calls} calls of a step of sampler {plan.sampler!r}")
    elif len(state.history) != (expected := sampler.history_length(state)):
        yield FieldViolation(
            _FIELD, f"keeps {len(state.history)} tensors; sampler {plan.sampler!r} then keeps {expected}"
        )
    if not 1 <= state.noise_draws <= state.step_index + 1:
        yield FieldViolation(_FIELD, f"has drawn noise {state.noise_draws} times in {state.step_index} steps")
    for name, tensor in [("latents", state.latents), *(("a kept tensor", each) for each in state.history)]:
        yield from _tensor_violations(name, tensor, shape)


def _tensor_violations(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterator[FieldViolation]:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        yield FieldViolation(
            _FIELD, f"{name}: is {list(tensor.shape)} of {tensor.dtype}; must be {list(shape)} of torch.float32"
        )
    elif not bool(tensor.isfinite().all()):
        yield FieldViolation(_FIELD, f"{name}: is not finite; resume from an earlier checkpoint")
