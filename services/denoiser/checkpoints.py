"""Checkpoints: a request's sampler state as a tensor of bytes, made so seldom that they cost next to nothing."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader
from safelight.v1.work_pb2 import Checkpoint
from services.common.exchange import BytesPayload, TensorStore
from services.common.metrics import Metrics
from services.denoiser.sampling.state import SamplerState, state_size, state_to_bytes

SHARE_OF_STEP_TIME = 0.01
# What a checkpoint costs until one has been made: on the slow side, so that the first ones are not too many.
_SECONDS_EACH, _SECONDS_A_BYTE = 0.5e-3, 1 / 250e6
_NEWEST_COUNTS = 0.2  # weight of the newest measurement


def affordable_interval(cost_seconds: float, step_seconds: float) -> int:
    """The smallest number of steps, at least 1, of whose time a checkpoint costs at most a hundredth."""
    if step_seconds <= 0:
        return 1
    return max(1, math.ceil(cost_seconds / (SHARE_OF_STEP_TIME * step_seconds)))


class CheckpointCosts:
    """Seconds that making a checkpoint takes, by the size of the state in bytes; refined with each one made."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def seconds(self, size: int) -> float:
        """The measured cost of a state of that size, or an estimate."""
        return self._seconds.get(size, _SECONDS_EACH + size * _SECONDS_A_BYTE)

    def record(self, size: int, seconds: float) -> None:
        """A checkpoint of that size has been made."""
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + _NEWEST_COUNTS * (seconds - known)


@dataclass
class CheckpointPace:
    """When the next checkpoint of one request is due.

    Args:
        every_steps: steps between two; 0: as few as are affordable.
        costs: what they cost here.
        step: the step of the last one, or the step that the request began at.
    """

    every_steps: int
    costs: CheckpointCosts
    step: int

    def due(self, state: SamplerState, step_seconds: float) -> bool:
        """Whether to make one of this state; if so, it counts as made. step_seconds: the request's share of a step."""
        interval = self.every_steps or affordable_interval(self.costs.seconds(state_size(state)), step_seconds)
        if state.step_index - self.step < interval:
            return False
        self.step = state.step_index
        return True


class CheckpointWriter:
    """Makes checkpoints and leases them out.

    Args:
        store: holds those that do not fit into a message.
        metrics: where their cost goes.
    """

    def __init__(self, store: TensorStore, metrics: Metrics) -> None:
        self.costs = CheckpointCosts()
        self._store = store
        self._metrics = metrics

    async def write(self, state: SamplerState, fingerprint: str) -> Checkpoint:
        """The checkpoint of a state, which no one writes to; fingerprint: of the denoiser's weights."""
        data, seconds = await asyncio.to_thread(_serialised, state)
        started = time.thread_time()  # on a busy machine the wait for a thread's turn is most of the clock's time
        header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[len(data)], fingerprint=fingerprint)
        ref = await self._store.put(header, BytesPayload(data))
        seconds += time.thread_time() - started
        self.costs.record(state_size(state), seconds)
        self._metrics.checkpoint_seconds.observe(seconds)
        return Checkpoint(step=state.step_index, sampler_state=ref)


def _serialised(state: SamplerState) -> tuple[bytes, float]:
    """The state's bytes, and the seconds of this thread that they took: what the steps could have used."""
    started = time.thread_time()
    return state_to_bytes(state), time.thread_time() - started
