"""Puts the gateway together."""

from __future__ import annotations

from gateway.admission import Admission
from gateway.catalog import Stages
from gateway.credits import Credits
from gateway.generation import Generation
from gateway.replicas import ReplicaSet
from gateway.servicer import GenerationServicer
from gateway.settings import GatewaySettings
from safelight.v1 import generation_service_pb2_grpc, model_service_pb2_grpc
from services.common.channels import ChannelPool
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.server import Service
from services.common.settings import SettingsError


def build_gateway(settings: GatewaySettings, metrics: Metrics) -> Service:
    """The gateway in front of the replicas that its settings name.

    Raises:
        SettingsError: a stage has no address.
    """
    channels = ChannelPool()
    stages = Stages(
        encoder=_replicas("encoder", settings.encoders, settings, channels, metrics),
        denoiser=_replicas("denoiser", settings.denoisers, settings, channels, metrics),
        decoder=_replicas("decoder", settings.decoders, settings, channels, metrics),
    )
    generation = Generation(
        stages,
        channels,
        settings,
        metrics,
        Admission(stages, settings, metrics),
        Credits(lambda: settings.max_images_in_stages or stages.capacity or settings.max_images_in_flight, metrics),
    )
    servicer = GenerationServicer(generation)
    model_servicer = ModelServicer(stages.models)

    async def start(address: str) -> None:
        for stage in stages.all:
            await stage.start()

    async def close() -> None:
        for stage in stages.all:
            await stage.close()
        await channels.close()

    mounts = {
        "safelight.v1.GenerationService": (
            lambda server: generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
        ),
        "safelight.v1.ModelService": (
            lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(model_servicer, server)
        ),
    }
    return Service("gateway", mounts, (), start, close)


def _replicas(
    stage: str, targets: tuple[str, ...], settings: GatewaySettings, channels: ChannelPool, metrics: Metrics
) -> ReplicaSet:
    if not targets:
        raise SettingsError(f"{stage}s: no address is given; set --{stage}s or SAFELIGHT_GATEWAY_{stage.upper()}S")
    return ReplicaSet(stage, targets, settings.health_interval_seconds, channels, metrics)
