"""A gateway in front of stages that compute nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import pytest

from gateway.service import build_gateway, make_surroundings
from gateway.settings import GatewaySettings
from safelight.v1.generation_service_pb2 import GenerateRequest, GenerateResponse
from safelight.v1.generation_service_pb2_grpc import GenerationServiceStub
from services.common.channels import open_channel
from services.common.metrics import Metrics
from services.common.server import Server, Service
from tests.serving import AT_ONCE
from tests.support.fake_stages import FakeDecoder, FakeDenoiser, FakeEncoder


@dataclass
class FakeDeployment:
    """The servers of a deployment of fakes, and a stub of its gateway."""

    encoders: list[Server]
    denoisers: list[Server]
    decoders: list[Server]
    stub: GenerationServiceStub
    metrics: Metrics

    async def events(self, request: GenerateRequest) -> list[GenerateResponse]:
        """Everything that happens to a request."""
        return [event async for event in self.stub.Generate(request, timeout=30)]

    def value(self, metric: str, **labels: str) -> float:
        """A metric of the gateway."""
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    async def until(self, metric: str, value: float, **labels: str) -> None:
        """Returns when a metric of the gateway has a value."""
        while self.value(metric, **labels) != value:  # noqa: ASYNC110  only the metric tells
            await asyncio.sleep(0.005)


class Deploy(Protocol):
    """The `deploy` fixture: starts fakes and a gateway in front of them; all are stopped when the test ends."""

    async def __call__(
        self,
        denoisers: Sequence[FakeDenoiser],
        decoders: Sequence[FakeDecoder] = (FakeDecoder(),),
        encoders: Sequence[FakeEncoder] = (FakeEncoder(),),
        **settings: Any,
    ) -> FakeDeployment: ...


@pytest.fixture
async def deploy() -> AsyncIterator[Deploy]:
    async with AsyncExitStack() as stack:

        async def serve(service: Service) -> Server:
            server = Server(service, AT_ONCE, Metrics())
            await server.start()
            stack.push_async_callback(server.stop)
            return server

        async def start(
            denoisers: Sequence[FakeDenoiser],
            decoders: Sequence[FakeDecoder] = (FakeDecoder(),),
            encoders: Sequence[FakeEncoder] = (FakeEncoder(),),
            **settings: Any,
        ) -> FakeDeployment:
            first, second, third = [
                [await serve(fake.service()) for fake in fakes] for fakes in (encoders, denoisers, decoders)
            ]
            chosen = GatewaySettings(
                encoders=tuple(server.address for server in first),
                denoisers=tuple(server.address for server in second),
                decoders=tuple(server.address for server in third),
                **{"drain_seconds": 0.0, "health_interval_seconds": 0.05, **settings},
            )
            surroundings = make_surroundings(chosen)
            gateway = Server(build_gateway(chosen, surroundings), chosen, surroundings.metrics)
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            channel: grpc.aio.Channel = open_channel(gateway.address)
            stack.push_async_callback(channel.close)
            return FakeDeployment(first, second, third, GenerationServiceStub(channel), surroundings.metrics)

        yield start
