"""Puts the gateway together."""

from __future__ import annotations

from gateway.adapters import Adapters
from gateway.admission import Admission
from gateway.catalog import Stages
from gateway.credits import Credits
from gateway.generation import Generation
from gateway.leases import Leases
from gateway.own_address import own_address
from gateway.replicas import ReplicaSet
from gateway.requests import Requests
from gateway.servicer import AdapterServicer, GenerationServicer
from gateway.settings import GatewaySettings
from safelight.v1 import adapter_service_pb2_grpc, generation_service_pb2_grpc, model_service_pb2_grpc
from services.common.channels import ChannelPool
from services.common.exchange import TensorExchangeServicer, TensorReader, TensorStore, mount_exchange
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.server import Service
from services.common.settings import SettingsError
from services.common.stage import Surroundings

_LEASE_SECONDS = 120.0  # how long a denoiser has to fetch a checkpoint


def make_surroundings(settings: GatewaySettings) -> Surroundings:
    """Surroundings for a gateway in a process of its own."""
    metrics = Metrics()
    return Surroundings(metrics, TensorStore(_LEASE_SECONDS, metrics), ChannelPool(settings.max_message_bytes))


def build_gateway(settings: GatewaySettings, surroundings: Surroundings) -> Service:
    """The gateway in front of the replicas that its settings name.

    Raises:
        SettingsError: a stage has no address.
    """
    channels, metrics, store = surroundings.channels, surroundings.metrics, surroundings.store
    stages = Stages(
        encoder=_replicas("encoder", settings.encoders, settings, channels, metrics),
        denoiser=_replicas("denoiser", settings.denoisers, settings, channels, metrics),
        decoder=_replicas("decoder", settings.decoders, settings, channels, metrics),
    )
    reader, leases = TensorReader(store, channels, settings.max_checkpoint_bytes, metrics), Leases(channels)
    admission, credits = (
        Admission(stages, settings, metrics),
        Credits(lambda: _most_in_stages(settings, stages), metrics),
    )
    adapters = Adapters(stages, settings.health_interval_seconds)
    generation = Generation(stages, reader, store, leases, settings, metrics, admission, credits, adapters)
    requests = Requests(generation.run, settings, metrics)
    servicer, model_servicer = GenerationServicer(requests), ModelServicer(stages.models)
    exchange_servicer, adapter_servicer = TensorExchangeServicer(store), AdapterServicer(adapters)

    async def start(address: str) -> None:
        surroundings.advertise(await own_address(address, settings.denoisers))
        for stage in stages.all:
            await stage.start()
        adapters.start()

    async def close() -> None:
        await requests.close()
        await adapters.close()
        await leases.settle()
        for stage in stages.all:
            await stage.close()
        await surroundings.close()

    mounts = {
        "safelight.v1.GenerationService": (
            lambda server: generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
        ),
        "safelight.v1.AdapterService": (
            lambda server: adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(adapter_servicer, server)
        ),
        "safelight.v1.ModelService": (
            lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(model_servicer, server)
        ),
        "safelight.v1.TensorExchangeService": lambda server: mount_exchange(exchange_servicer, server),
    }
    return Service("gateway", mounts, (), start, close)


def _most_in_stages(settings: GatewaySettings, stages: Stages) -> int:
    """Pictures that may have tensors in the stages at once."""
    return settings.max_images_in_stages or stages.capacity or settings.max_images_in_flight


def _replicas(
    stage: str, targets: tuple[str, ...], settings: GatewaySettings, channels: ChannelPool, metrics: Metrics
) -> ReplicaSet:
    if not targets:
        raise SettingsError(f"{stage}s: no address is given; set --{stage}s or SAFELIGHT_GATEWAY_{stage.upper()}S")
    return ReplicaSet(stage, targets, settings.health_interval_seconds, channels, metrics)
