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
from safelight.v1 import model_service_pb2_grpc, tensor_exchange_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.channels import ChannelPool
from services.common.exchange import TensorExchangeServicer, TensorReader, TensorStore
from services.common.logs import configure_logs
from services.common.manifest import ManifestError
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.server import BindError, Server, Service, stop_signal
from services.common.settings import ServerSettings, SettingsError, StageSettings, load_settings

Settings = TypeVar("Settings", bound=ServerSettings)
Stage = TypeVar("Stage", bound=StageSettings)
EXIT_BAD_CONFIGURATION = 2


@dataclass(frozen=True)
class Surroundings:
    """What a stage is built into: its metrics, the leases of its process, and connections to other stages."""

    metrics: Metrics
    store: TensorStore
    channels: ChannelPool

    def reader(self, settings: StageSettings) -> TensorReader:
        """A reader of tensor references with the stage's limit."""
        return TensorReader(self.store, self.channels, settings.max_tensor_bytes, self.metrics)


def make_surroundings(settings: StageSettings) -> Surroundings:
    """Surroundings for a stage in a process of its own."""
    metrics = Metrics()
    return Surroundings(metrics, TensorStore(settings.lease_seconds, metrics), ChannelPool())


def stage_mounts(
    store: TensorStore, models: Sequence[ModelDescription]
) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """The services that every stage mounts beside its own."""
    model_servicer, exchange_servicer = ModelServicer(lambda: models), TensorExchangeServicer(store)
    return {
        "safelight.v1.ModelService": lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            model_servicer, server
        ),
        "safelight.v1.TensorExchangeService": (
            lambda server: tensor_exchange_service_pb2_grpc.add_TensorExchangeServiceServicer_to_server(
                exchange_servicer, server
            )
        ),
    }


def run_stage(settings_class: type[Stage], build: Callable[[Stage, Surroundings], Service]) -> None:
    """The whole life of a stage's process."""

    def build_alone(settings: Stage) -> tuple[Service, Metrics]:
        surroundings = make_surroundings(settings)
        return build(settings, surroundings), surroundings.metrics

    run_server(settings_class, build_alone)


def run_server(settings_class: type[Settings], build: Callable[[Settings], tuple[Service, Metrics]]) -> None:
    """The whole life of a server process: settings, service, server, SIGTERM, end. Exits 2 on a bad configuration."""
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
