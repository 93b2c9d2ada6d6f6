"""A running denoiser with the tiny model, and calls to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest
from torch import Tensor

from safelight.errors import SafelightError, from_rpc_error
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from safelight.v1.work_pb2 import Checkpoint
from services.common.exchange import BytesPayload
from services.common.server import Server
from services.modeling.wire import to_tensor


class RunningDenoiser:
    """A denoiser's server and a channel to it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel
        self.stub = DenoiserServiceStub(channel)

    async def events(self, request: DenoiseRequest) -> list[DenoiseResponse]:
        """Everything that happens to a request."""
        return [event async for event in self.stub.Denoise(request, timeout=60)]

    async def latents(self, request: DenoiseRequest) -> Tensor:
        """The latent of a request."""
        return latents_of(await self.events(request))

    async def failure(self, request: DenoiseRequest) -> SafelightError:
        """What a request fails with, as the SDK shows it."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.events(request)
        return from_rpc_error(caught.value)

    def steps(self, *outcomes: str) -> float:
        """Steps computed so far, of these outcomes or of any."""
        return sum(
            self.metric("safelight_denoise_steps_total", model="tiny", outcome=outcome)
            for outcome in outcomes or ("useful", "wasted")
        )

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if nothing has been counted."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until_idle(self) -> None:
        """Returns when no request is in flight."""
        while self.metric("safelight_running", stage="denoiser"):  # noqa: ASYNC110  only the metric tells
            await asyncio.sleep(0.001)


StartDenoiser = Callable[..., Awaitable[RunningDenoiser]]
"""The `start` fixture: starts a denoiser with these settings beside the usual ones."""


def latents_of(events: list[DenoiseResponse]) -> Tensor:
    """The latent that a stream ended with."""
    ref = events[-1].result.latents
    return to_tensor(ref.header, BytesPayload(ref.inline))


def kinds(events: list[DenoiseResponse]) -> list[str]:
    """What the events are, without the heartbeats, which come when the machine is slow."""
    return [kind for event in events if (kind := str(event.WhichOneof("event"))) != "heartbeat"]


def checkpoints_of(events: list[DenoiseResponse]) -> list[Checkpoint]:
    """The checkpoints among the events."""
    return [event.checkpoint for event in events if event.HasField("checkpoint")]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
