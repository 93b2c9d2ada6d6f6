"""The replicas of one stage: which are healthy, what they serve, how much work each has, and who gets the next."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from safelight.errors import StageUnavailableError, UnknownModelError
from safelight.v1 import model_service_pb2, model_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.channels import ChannelPool
from services.common.metrics import Metrics

_log = logging.getLogger("safelight.replicas")
_PROBE_SECONDS = 2.0
# A replica that refuses a probe is gone; one that is slow to answer may be busy, and is left out only after so many.
_SLOW_PROBES = 3
_DNS_PREFIX = "dns:///"


@dataclass(eq=False)
class Replica:
    """One server of a stage, as the gateway sees it.

    Args:
        address: gRPC target.
        channel: connection to it.
        healthy: whether it may be given work.
        slow_probes: probes in a row that got no answer in time.
        outstanding: work given to it and not yet ended, in the stage's own unit.
        models: what it serves.
    """

    address: str
    channel: grpc.aio.Channel
    healthy: bool = False
    slow_probes: int = 0
    outstanding: float = 0.0
    models: dict[str, ModelDescription] = field(default_factory=dict)

    @contextmanager
    def work(self, cost: float) -> Iterator[None]:
        """Counts a piece of work as outstanding while it runs."""
        self.outstanding += cost
        try:
            yield
        finally:
            self.outstanding -= cost


class ReplicaSet:
    """All replicas of one stage.

    Args:
        stage: "encoder", "denoiser" or "decoder".
        targets: addresses from the settings; dns:/// ones stand for every address of the name.
        interval_seconds: time between two probes.
        channels: connections.
        metrics: where health is shown.
    """

    def __init__(
        self, stage: str, targets: Sequence[str], interval_seconds: float, channels: ChannelPool, metrics: Metrics
    ) -> None:
        self.stage = stage
        self._targets = targets
        self._interval_seconds = interval_seconds
        self._channels = channels
        self._metrics = metrics
        self._replicas: dict[str, Replica] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Probe every replica once, then keep probing in the background."""
        await self.refresh()
        self._task = asyncio.create_task(self._keep_refreshing(), name=f"{self.stage}-replicas")

    async def close(self) -> None:
        """Stop probing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def models(self) -> dict[str, ModelDescription]:
        """The models that at least one healthy replica serves."""
        return {name: model for replica in self._healthy() for name, model in replica.models.items()}

    def pick(self, model: str, avoid: Collection[Replica] = ()) -> Replica:
        """The healthy replica of a model with the least outstanding work; one of `avoid` only if there is no other.

        Raises:
            StageUnavailableError: no replica of the stage is healthy.
            UnknownModelError: the healthy ones do not serve the model.
        """
        healthy = self._healthy()
        if not healthy:
            raise StageUnavailableError(
                f"no {self.stage} is reachable (of {len(self._replicas)} known): start one, or retry when it is back",
                retry_after_seconds=self._interval_seconds,
                stage=self.stage,
            )
        serving = [replica for replica in healthy if model in replica.models]
        if not serving:
            raise UnknownModelError(f"model {model!r} is served by no {self.stage}", model=model)
        return min(serving, key=lambda replica: (replica in avoid, replica.outstanding))

    def report_failure(self, replica: Replica) -> None:
        """Leave a replica out until its next good probe: a call to it found it unreachable."""
        replica.healthy = False
        self._report()

    async def refresh(self) -> None:
        """Look up every target and probe every replica, all at once."""
        addresses = await self._resolve()
        for gone in self._replicas.keys() - addresses:
            del self._replicas[gone]
        for address in addresses - self._replicas.keys():
            self._replicas[address] = Replica(address, self._channels.get(address))
        await asyncio.gather(*(self._probe(replica) for replica in self._replicas.values()))
        self._report()

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.refresh()

    async def _resolve(self) -> set[str]:
        resolved = await asyncio.gather(*(_addresses(target) for target in self._targets))
        return {address for addresses in resolved for address in addresses}

    async def _probe(self, replica: Replica) -> None:
        was_healthy = replica.healthy
        try:
            health: Any = health_pb2_grpc.HealthStub(replica.channel)  # its stubs do not name the calls
            status = await health.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS)
            if status.status == health_pb2.HealthCheckResponse.SERVING:
                await self._read_models(replica)
                replica.healthy, replica.slow_probes = True, 0
            else:
                replica.healthy = False
        except grpc.aio.AioRpcError as error:
            slow = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            replica.slow_probes = replica.slow_probes + 1 if slow else 0
            replica.healthy &= slow and replica.slow_probes < _SLOW_PROBES
        if replica.healthy != was_healthy:
            _log.info("replica changed", extra={"replica": replica.address, "healthy": replica.healthy})

    async def _read_models(self, replica: Replica) -> None:
        stub = model_service_pb2_grpc.ModelServiceStub(replica.channel)
        response = await stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=_PROBE_SECONDS)
        replica.models = {model.name: model for model in response.models}

    def _healthy(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.healthy]

    def _report(self) -> None:
        healthy = len(self._healthy())
        self._metrics.replicas.labels(self.stage, "true").set(healthy)
        self._metrics.replicas.labels(self.stage, "false").set(len(self._replicas) - healthy)


async def _addresses(target: str) -> set[str]:
    """What a target stands for now; a name that does not resolve stands for nothing."""
    if not target.startswith(_DNS_PREFIX):
        return {target}
    host, _, port = target.removeprefix(_DNS_PREFIX).rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return set()
    return {f"[{ip[0]}]:{port}" if family == socket.AF_INET6 else f"{ip[0]}:{port}" for family, _, _, _, ip in found}
