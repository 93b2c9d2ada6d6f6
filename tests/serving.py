"""Servers for tests: a servicer of a few lines, the real bootstrap around it, a real channel to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import pytest

from safelight.errors import SafelightError, from_rpc_error
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceServicer, add_DenoiserServiceServicer_to_server
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server
from services.common.request_context import Context
from services.common.server import Server, Service
from services.common.settings import ServerSettings, StageSettings
from services.common.stage import Surroundings

Encode = Callable[[EncodeRequest], Awaitable[EncodeResponse]]
Denoise = Callable[[DenoiseRequest], AsyncGenerator[DenoiseResponse, None]]
ENCODE, DENOISE = "safelight.v1.EncoderService/Encode", "safelight.v1.DenoiserService/Denoise"
AT_ONCE = ServerSettings(drain_seconds=0.0)
"""Settings of a server that ends its calls when it stops."""


@dataclass(frozen=True)
class Running:
    """A server, and a channel to it."""

    server: Server
    channel: grpc.aio.Channel


class Serve(Protocol):
    """The `serve` fixture: starts a service on a free port; everything is stopped when the test ends."""

    async def __call__(self, service: Service, settings: ServerSettings = AT_ONCE) -> Running: ...


BuildStage = Callable[[Any, Surroundings], Service]


class StartStage(Protocol):
    """The `start_stage` fixture: starts a real stage on a free port; it is stopped when the test ends."""

    async def __call__(self, settings: StageSettings, build: BuildStage) -> Running: ...


class _Encoder(EncoderServiceServicer):
    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    async def Encode(self, request: EncodeRequest, context: Context) -> EncodeResponse:
        return await self._encode(request)


class _Denoiser(DenoiserServiceServicer):
    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise

    async def Denoise(self, request: DenoiseRequest, context: Context) -> AsyncIterator[DenoiseResponse]:
        async with aclosing(self._denoise(request)) as responses:
            async for response in responses:
                yield response


def unary(encode: Encode, models: Sequence[str] = ()) -> Service:
    """A service whose only method, EncoderService.Encode, is the function."""
    name = "safelight.v1.EncoderService"
    return Service(
        "encoder", {name: lambda server: add_EncoderServiceServicer_to_server(_Encoder(encode), server)}, models
    )


def streaming(denoise: Denoise) -> Service:
    """A service whose only method, DenoiserService.Denoise, is the function."""
    name = "safelight.v1.DenoiserService"
    return Service("denoiser", {name: lambda server: add_DenoiserServiceServicer_to_server(_Denoiser(denoise), server)})


def failing(error: Exception) -> Service:
    """A unary service that raises."""

    async def encode(request: EncodeRequest) -> EncodeResponse:
        raise error

    return unary(encode)


async def failure(call: Awaitable[Any]) -> SafelightError:
    """What a call fails with, as the SDK shows it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)
