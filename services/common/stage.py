"""From a stage's settings to a running server: the part of `python -m services.<stage>` that all stages share."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from safelight.errors import CheckpointError
from safelight.v1 import load_service_pb2_grpc, model_service_pb2_grpc
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.model_pb2 import ModelDescription
from services.common.allocator import keep_freed_memory
from services.common.channels import ChannelPool
from services.common.exchange import (
    SharedMemoryServer,
    TensorExchangeServicer,
    TensorReader,
    TensorStore,
    mount_exchange,
)
from services.common.load_servicer import LoadServicer
from services.common.logs import configure_logs
from services.common.manifest import ManifestError, ModelEntry, load_manifest, offload_fault, with_offload
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.server import BindError, Server, Service, stop_signal
from services.common.settings import ServerSettings, SettingsError, StageSettings, load_settings

Settings = TypeVar("Settings", bound=ServerSettings)
Stage = TypeVar("Stage", bound=StageSettings)
EXIT_BAD_CONFIGURATION = 2


@dataclass(frozen=True)
class Surroundings:
    """What a stage is built into: its metrics, the leases of its process, and connections to other stages.

    Args:
        shared_memory: hands the leased tensors to other processes of the host; not needed where there are none.
    """

    metrics: Metrics
    store: TensorStore
    channels: ChannelPool
    shared_memory: SharedMemoryServer | None = None

    def reader(self, settings: StageSettings) -> TensorReader:
        """A reader of tensor references with the stage's limit."""
        return TensorReader(self.store, self.channels, settings.max_tensor_bytes, self.metrics)

    def advertise(self, address: str) -> None:
        """Let other processes come for the leased tensors at that address."""
        self.store.advertise(address)
        if self.shared_memory is not None:
            self.shared_memory.start()

    async def close(self) -> None:
        """End the connections to other processes."""
        if self.shared_memory is not None:
            await self.shared_memory.close()
        await self.channels.close()


def make_surroundings(settings: StageSettings) -> Surroundings:
    """Surroundings for a stage in a process of its own."""
    metrics = Metrics()
    store = TensorStore(settings.lease_seconds, metrics)
    return Surroundings(metrics, store, ChannelPool(), SharedMemoryServer(store, settings.shared_memory_bytes))


def served_models(settings: StageSettings) -> tuple[ModelEntry, ...]:
    """The models of the manifest, offloaded as the stage's settings say where they say nothing of it.

    Raises:
        ManifestError: the manifest can't be read.
        SettingsError: there is no such offload.
    """
    if fault := offload_fault(settings.offload, settings.memory_budget):
        raise SettingsError(fault)
    return with_offload(load_manifest(settings.manifest), settings.offload, settings.memory_budget)


def stage_mounts(
    store: TensorStore, models: Sequence[ModelDescription], load: Callable[[], GetLoadResponse]
) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """The services that every stage mounts beside its own."""
    model_servicer, exchange_servicer = ModelServicer(lambda: models), TensorExchangeServicer(store)
    load_servicer = LoadServicer(load)
    return {
        "safelight.v1.LoadService": lambda server: load_service_pb2_grpc.add_LoadServiceServicer_to_server(
            load_servicer, server
        ),
        "safelight.v1.ModelService": lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            model_servicer, server
        ),
        "safelight.v1.TensorExchangeService": lambda server: mount_exchange(exchange_servicer, server),
    }


def run_stage(settings_class: type[Stage], build: Callable[[Stage, Surroundings], Service]) -> None:
    """The whole life of a stage's process."""

    def build_alone(settings: Stage) -> tuple[Service, Metrics]:
        surroundings = make_surroundings(settings)
        return build(settings, surroundings), surroundings.metrics

    run_server(settings_class, build_alone)


def run_server(settings_class: type[Settings], build: Callable[[Settings], tuple[Service, Metrics]]) -> None:
    """The whole life of a server process: settings, service, server, SIGTERM, end. Exits 2 on a bad configuration."""
    keep_freed_memory()
    try:
        settings = load_settings(settings_class, sys.argv[1:], os.environ)
        configure_logs(settings_class.service, settings.log_level)
        service, metrics = build(settings)
        asyncio.run(_serve(Server(service, settings, metrics)))
    except (SettingsError, ManifestError, CheckpointError, BindError) as error:
        sys.stderr.write(f"{settings_class.service}: {error}\n")
        sys.exit(EXIT_BAD_CONFIGURATION)


async def _serve(server: Server) -> None:
    stop = stop_signal()  # heeded from here on, also while the server starts
    await server.start()
    await stop.wait()
    await server.stop()
