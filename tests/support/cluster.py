"""A whole deployment inside a test: every replica is a server with leases of its own, as on machines of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.service import build_gateway
from gateway.service import make_surroundings as make_gateway_surroundings
from gateway.settings import GatewaySettings
from safelight import AsyncClient, RetryPolicy
from services.common.server import Server, Service
from services.common.settings import StageSettings
from services.common.stage import Surroundings, make_surroundings
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from services.encoder.service import build_encoder
from services.encoder.settings import EncoderSettings

Stage = TypeVar("Stage", bound=StageSettings)


@dataclass
class Cluster:
    """The servers of a deployment, and a client of its gateway."""

    encoders: list[Server] = field(default_factory=list)
    denoisers: list[Server] = field(default_factory=list)
    decoders: list[Server] = field(default_factory=list)
    gateway: Server | None = None
    client: AsyncClient | None = None

    @property
    def servers(self) -> list[Server]:
        """All of them, in the order in which they were started."""
        return [*self.encoders, *self.denoisers, *self.decoders, *([self.gateway] if self.gateway else [])]

    async def until(self, metric: str, value: float, **labels: str) -> None:
        """Returns when the sum of a metric has a value."""
        while self.total(metric, **labels) != value:  # noqa: ASYNC110  only the metric tells
            await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        """Returns when no denoiser has work."""
        await self.until("safelight_running", 0)

    async def until_replicas(self, stage: str, healthy: int) -> None:
        """Returns when the gateway sees so many healthy replicas."""
        await self.until("safelight_replicas", healthy, stage=stage, healthy="true")

    async def restart_denoiser(self, stopped: Server, manifest: str) -> Server:
        """A new denoiser at the address of one that was stopped."""
        settings = DenoiserSettings(
            listen=stopped.address, manifest=manifest, device="cpu", drain_seconds=0.0, warm_up_steps=0
        )
        return await _start(settings, build_denoiser)

    def total(self, metric: str, **labels: str) -> float:
        """Sum of a metric's samples over all servers."""
        registries = [server.metrics.registry for server in self.servers]
        return sum(
            sample.value
            for registry in registries
            for family in registry.collect()
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )


@asynccontextmanager
async def run_cluster(
    manifest: str,
    *,
    encoders: int = 1,
    denoisers: int = 1,
    decoders: int = 1,
    encoder: dict[str, Any] | None = None,
    denoiser: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    gateway: dict[str, Any] | None = None,
) -> AsyncIterator[Cluster]:
    """Start a deployment; dictionaries are settings beside the usual ones."""
    cluster = Cluster()
    try:
        shared: dict[str, Any] = {"manifest": manifest, "drain_seconds": 0.0, "device": "cpu"}
        for _ in range(encoders):
            cluster.encoders.append(await _start(EncoderSettings(**shared, **(encoder or {})), build_encoder))
        for _ in range(denoisers):
            settings = shared | {"warm_up_steps": 0} | (denoiser or {})
            cluster.denoisers.append(await _start(DenoiserSettings(**settings), build_denoiser))
        for _ in range(decoders):
            cluster.decoders.append(await _start(DecoderSettings(**shared, **(decoder or {})), build_decoder))
        cluster.gateway = await _start_gateway(cluster, gateway or {})
        cluster.client = AsyncClient(cluster.gateway.address, retry=RetryPolicy.none)
        yield cluster
    finally:
        if cluster.client is not None:
            await cluster.client.close()
        for server in reversed(cluster.servers):
            await server.stop()


async def _start(settings: Stage, build: Callable[[Stage, Surroundings], Service]) -> Server:
    surroundings = make_surroundings(settings)
    server = Server(build(settings, surroundings), settings, surroundings.metrics)
    await server.start()
    return server


async def _start_gateway(cluster: Cluster, settings: dict[str, Any]) -> Server:
    gateway = GatewaySettings(
        encoders=_addresses(cluster.encoders),
        denoisers=_addresses(cluster.denoisers),
        decoders=_addresses(cluster.decoders),
        **{"drain_seconds": 0.0, "health_interval_seconds": 0.1, **settings},
    )
    surroundings = make_gateway_surroundings(gateway)
    server = Server(build_gateway(gateway, surroundings), gateway, surroundings.metrics)
    await server.start()
    return server


def _addresses(servers: Sequence[Server]) -> tuple[str, ...]:
    return tuple(server.address for server in servers)
