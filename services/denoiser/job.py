"""A request while it is denoised."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from safelight.v1.tensor_pb2 import TensorRef
from services.denoiser.checkpoints import CheckpointPace
from services.denoiser.inpainting import Inpainting
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.state import SamplerState
from services.modeling.lora.adapter import Applied


class BatchKey(NamedTuple):
    """Requests of equal key can share a forward pass, and their steps cost the same.

    Args:
        model: name of the model.
        latent_shape: extents of the latent without its batch axis.
        conditioning: what the model says of the conditioning, e.g. its length.
        exact: of the exact class, whose rows run one by one.
    """

    model: str
    latent_shape: tuple[int, ...]
    conditioning: Hashable
    exact: bool


@dataclass(frozen=True, eq=False)
class StepDone:
    """A step of the request has been computed.

    Args:
        step: steps done.
        seconds: of its forward passes.
        batch_size: requests that shared the last of them.
        checkpoint: the state after the step, where a checkpoint of it is due.
        denoised: the prediction of the finished latent [1, C, ...], where a preview of it is due.
    """

    step: int
    seconds: float
    batch_size: int
    checkpoint: SamplerState | None
    denoised: Tensor | None


@dataclass(eq=False)
class DenoiseJob:
    """Everything about one request that changes from step to step, and what its steps need.

    Args:
        model: name of the model.
        plan: sigmas and timesteps.
        noise: the request's own random numbers.
        state: latents and where the sampler stands; a new one after each step, never written to.
        guidance_scale: of classifier-free guidance.
        positive: what the model made of the prompt's conditioning, once for all steps.
        negative: the same for the negative prompt; None without guidance.
        adapters: LoRAs that are applied to both.
        inpainting: what stays of the picture that it began with; None: nothing.
        deadline: `time.monotonic()` after which the result is worthless; None: never.
        tenant: whose share of the device its steps count against.
        priority: higher goes first among the work of one tenant.
        resumed: it goes on from a checkpoint.
        exact: every row gets a forward pass of its own, so that company never changes a bit.
        checkpoints: when to make checkpoints; None: never.
        preview_every: steps between previews; 0: none.
        received_bytes: bytes of tensors that were pulled for it from other processes.
        denoised: the last step's prediction of the finished latent, if a preview of it is due.
        events: what the stream tells of: `StepDone`, or the exception that ended the request.
        leased: its last checkpoints, which may still be fetched, newest last.
    """

    model: str
    plan: SamplingPlan
    noise: NoiseSource
    state: SamplerState
    guidance_scale: float
    positive: Any
    negative: Any | None
    adapters: tuple[Applied, ...] = ()
    inpainting: Inpainting | None = None
    deadline: float | None = None
    tenant: str = ""
    priority: int = 0
    resumed: bool = False
    exact: bool = False
    checkpoints: CheckpointPace | None = None
    preview_every: int = 0
    received_bytes: int = 0
    denoised: Tensor | None = None
    events: asyncio.Queue[StepDone | Exception] = field(default_factory=asyncio.Queue)
    leased: deque[TensorRef] = field(default_factory=deque)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    compute_seconds: float = 0.0
    step_seconds: float = 0.0  # of the step under way
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.state.step_index

    @property
    def rows(self) -> int:
        """Rows it takes of a forward pass."""
        return 1 if self.negative is None else 2

    @property
    def steps(self) -> int:
        """Steps that are run in all."""
        return len(self.plan.timesteps)

    @property
    def steps_run(self) -> int:
        """Steps computed here: all that are done but those before the checkpoint it was resumed from."""
        return self.state.step_index - self.first_step

    @property
    def done(self) -> bool:
        """Whether its last step has been computed."""
        return self.state.step_index == self.steps

    @property
    def queue_seconds(self) -> float:
        """Seconds from arrival to the first step."""
        return 0.0 if self.started is None else self.started - self.arrived

    def expired(self, now: float) -> bool:
        """Whether its deadline has passed at `now`."""
        return self.deadline is not None and self.deadline <= now

    def preview_due(self, step: int) -> bool:
        """Whether to show the prediction of that step; after the last one the picture itself follows."""
        return self.preview_every > 0 and step % self.preview_every == 0 and step < self.steps
