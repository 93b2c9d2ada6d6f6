"""The replicas of one stage: which are healthy, what they serve, how busy each is, and who gets the next work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.estimate import Pending, StageLoad
from gateway.load import Backlog
from gateway.targets import addresses_of
from gateway.work import Work
from safelight.errors import (
    FingerprintMismatchError,
    ModelRestartingError,
    StageUnavailableError,
    UnknownAdapterError,
    UnknownModelError,
)
from safelight.v1 import load_service_pb2, load_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.channels import ChannelPool
from services.common.metrics import Metrics

_log = logging.getLogger("safelight.replicas")
_PROBE_SECONDS = 2.0
# A replica that refuses a probe is gone; one that is slow to answer may be busy, and is left out only after so many.
_SLOW_PROBES = 3


@dataclass(eq=False)
class Replica:
    """One server of a stage, as the gateway sees it.

    Args:
        address: gRPC target.
        channel: connection to it.
        healthy: whether it answers.
        slow_probes: probes in a row that got no answer in time.
        outstanding: work given to it and not yet ended, by size; counts where nothing has been measured.
        backlog: what it has to do.
        models: what it serves.
    """

    address: str
    channel: grpc.aio.Channel
    healthy: bool = False
    slow_probes: int = 0
    outstanding: float = 0.0
    backlog: Backlog = field(default_factory=Backlog)
    models: dict[str, ModelDescription] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether it may be given work."""
        return self.healthy and not self.backlog.report.draining

    @property
    def silent(self) -> bool:
        """Whether it has left several probes in a row without an answer: it is frozen, or its machine is gone."""
        return self.slow_probes >= _SLOW_PROBES

    def adapters(self, model: str) -> dict[str, str]:
        """Fingerprints of the LoRAs that it has loaded, by name."""
        known = self.models.get(model, ModelDescription())
        return {adapter.name: adapter.fingerprint for adapter in known.adapters}

    def note_restart(self, model: str) -> None:
        """A call was told that the model is being started again; the next probe tells more."""
        if model in self.models:
            self.models[model].restarting = True

    @contextmanager
    def work(self, work: Work) -> Iterator[None]:
        """Counts a piece of work as outstanding while it runs."""
        given = self.backlog.give(work, time.monotonic())
        self.outstanding += work.size
        try:
            yield
        finally:
            self.outstanding -= work.size
            self.backlog.take_back(given)

    def seconds_until_done(self, work: Work) -> float | None:
        """Estimated time until a new piece of work would be done; None: it has measured nothing like it."""
        seconds = self.backlog.costs.seconds(work)
        return None if seconds is None else self.backlog.at(time.monotonic()).backlog_seconds + seconds


class ReplicaSet:
    """All replicas of one stage, and the work `pending` for them: admitted, and given to none of them yet.

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
        self.pending = Pending()
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
        """The models that at least one available replica serves."""
        return {name: model for replica in self.available for name, model in replica.models.items()}

    def load(self, model: str) -> StageLoad:
        """What the replicas that serve a model have to do, and what is to come."""
        now = time.monotonic()
        serving = [replica for replica in self.available if model in replica.models]
        return StageLoad([replica.backlog.at(now) for replica in serving], self.pending)

    @property
    def capacity(self) -> int:
        """Requests that the available replicas take at most; when there is none, all those that are known."""
        replicas = self.available or self._replicas.values()
        return sum(replica.backlog.report.capacity for replica in replicas)

    def pick(
        self, model: str, avoid: Collection[Replica] = (), fingerprint: str = "", work: Work | None = None
    ) -> Replica:
        """The available replica of a model that will be done first with a piece of work.

        Where one of them has measured nothing like it, the one with the least outstanding work.

        Args:
            model: name of the model.
            avoid: taken only if there is no other.
            fingerprint: of the weights asked for; empty: any.
            work: what it will be given.

        Raises:
            StageUnavailableError: no replica of the stage is available.
            UnknownModelError: those that are do not serve the model.
            ModelRestartingError: those that do are starting it again.
            FingerprintMismatchError: they serve it with other weights.
            UnknownAdapterError: they have not loaded the adapters of the work.
        """
        serving = self.serving(model, fingerprint, work.adapters if work else {})
        estimates = {replica: replica.seconds_until_done(work) if work else None for replica in serving}
        done = {replica: seconds for replica, seconds in estimates.items() if seconds is not None}
        if len(done) < len(serving):
            done = dict.fromkeys(serving, 0.0)
        return min(serving, key=lambda replica: (replica in avoid, done[replica], replica.outstanding))

    def serving(
        self, model: str, fingerprint: str = "", adapters: Mapping[str, str] = MappingProxyType({})
    ) -> list[Replica]:
        """The available replicas of a model with these weights and, by name and fingerprint, adapters; at least one.

        Raises:
            StageUnavailableError, UnknownModelError, ModelRestartingError, FingerprintMismatchError,
            UnknownAdapterError: as `pick`.
        """
        available = self.available
        if not available:
            raise StageUnavailableError(
                f"no {self.stage} is reachable (of {len(self._replicas)} known): start one, or retry when it is back",
                retry_after_seconds=self._interval_seconds,
                stage=self.stage,
            )
        serving = [replica for replica in available if model in replica.models]
        if not serving:
            raise UnknownModelError(f"model {model!r} is served by no {self.stage}", model=model)
        there = [replica for replica in serving if not replica.models[model].restarting]
        if not there:
            raise ModelRestartingError(
                f"the processes of model {model!r} are started again at every {self.stage}: retry when they are up",
                retry_after_seconds=self._interval_seconds,
                stage=self.stage,
                model=model,
            )
        alike = [replica for replica in there if fingerprint in ("", self._fingerprint(replica.models[model]))]
        if not alike:
            raise FingerprintMismatchError(
                f"no {self.stage} has model {model!r} with the weights {fingerprint} any more: send the request again",
                stage=self.stage,
                model=model,
                fingerprint=fingerprint,
            )
        adapted = [replica for replica in alike if adapters.items() <= replica.adapters(model).items()]
        if not adapted:
            raise UnknownAdapterError(
                f"no {self.stage} of model {model!r} has the adapters {', '.join(adapters)} now: load them, or wait",
                stage=self.stage,
                model=model,
            )
        return adapted

    def adapters(self, model: str) -> dict[str, str]:
        """Fingerprints of the LoRAs that at least one available replica has, by name."""
        return {name: mark for replica in self.available for name, mark in replica.adapters(model).items()}

    def _fingerprint(self, model: ModelDescription) -> str:
        """Fingerprint of the weights that the stage has of a model."""
        return str(getattr(model, self.stage).fingerprint)

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
        resolved = await asyncio.gather(*(addresses_of(target) for target in self._targets))
        return {address for addresses in resolved for address in addresses}

    async def _probe(self, replica: Replica) -> None:
        was_healthy = replica.healthy
        try:
            health: Any = health_pb2_grpc.HealthStub(replica.channel)  # its stubs do not name the calls
            status = await health.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS)
            if status.status == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.gather(self._read_models(replica), self._read_load(replica))
                replica.healthy, replica.slow_probes = True, 0
            else:
                replica.healthy = False
        except grpc.aio.AioRpcError as error:
            slow = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            replica.slow_probes = replica.slow_probes + 1 if slow else 0
            replica.healthy &= slow and not replica.silent
        if replica.healthy != was_healthy:
            _log.info("replica changed", extra={"replica": replica.address, "healthy": replica.healthy})

    async def _read_models(self, replica: Replica) -> None:
        stub = model_service_pb2_grpc.ModelServiceStub(replica.channel)
        response = await stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=_PROBE_SECONDS)
        replica.models = {model.name: model for model in response.models}

    async def _read_load(self, replica: Replica) -> None:
        asked_at = time.monotonic()
        stub = load_service_pb2_grpc.LoadServiceStub(replica.channel)
        try:
            report = await stub.GetLoad(load_service_pb2.GetLoadRequest(), timeout=_PROBE_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNIMPLEMENTED:  # a stage of an earlier release does not tell
                raise
        else:
            replica.backlog.update(report, asked_at)

    @property
    def available(self) -> list[Replica]:
        """The replicas that may be given work."""
        return [replica for replica in self._replicas.values() if replica.available]

    def _report(self) -> None:
        healthy = sum(replica.healthy for replica in self._replicas.values())
        self._metrics.replicas.labels(self.stage, "true").set(healthy)
        self._metrics.replicas.labels(self.stage, "false").set(len(self._replicas) - healthy)
        now = time.monotonic()
        backlog = sum(replica.backlog.at(now).backlog_seconds for replica in self.available)
        self._metrics.stage_backlog_seconds.labels(self.stage).set(backlog + self.pending.seconds)
