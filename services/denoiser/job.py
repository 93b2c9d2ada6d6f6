"""A request while it is denoised."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.sampler import SamplingPlan
from services.denoiser.sampling.state import SamplerState


@dataclass(frozen=True)
class StepDone:
    """A step of the request has been computed."""

    step: int
    steps: int
    seconds: float
    batch_size: int


@dataclass(eq=False)
class DenoiseJob:
    """Everything about one request that changes from step to step, and what its steps need.

    Args:
        model: name of the model.
        plan: sigmas and timesteps.
        noise: the request's own random numbers.
        state: latents and where the sampler stands.
        guidance_scale: of classifier-free guidance.
        positive: what the model made of the prompt's conditioning, once for all steps.
        negative: the same for the negative prompt; None without guidance.
        deadline: seconds since the epoch after which the result is worthless; None: never.
        events: what the servicer streams: `StepDone`, or the exception that ended the request.
    """

    model: str
    plan: SamplingPlan
    noise: NoiseSource
    state: SamplerState
    guidance_scale: float
    positive: Any
    negative: Any | None
    deadline: float | None
    events: asyncio.Queue[StepDone | Exception] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    compute_seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows it takes of a forward pass."""
        return 1 if self.negative is None else 2

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.plan.timesteps)

    @property
    def queue_seconds(self) -> float:
        """Seconds from arrival to the first step."""
        return 0.0 if self.started is None else self.started - self.arrived
