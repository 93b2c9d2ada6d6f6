"""Puts the denoiser together."""

from __future__ import annotations

from safelight.v1 import denoiser_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.executor import DeviceExecutor
from services.common.manifest import load_manifest
from services.common.server import Service
from services.common.stage import Surroundings, stage_mounts
from services.denoiser.denoising import Denoising
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob
from services.denoiser.loop import DenoiseLoop
from services.denoiser.registry import LOADERS, Denoiser
from services.denoiser.scheduler import StepScheduler
from services.denoiser.servicer import DenoiserServicer
from services.denoiser.settings import DenoiserSettings
from services.modeling.components import configure_torch
from services.modeling.loading import load_models


def build_denoiser(settings: DenoiserSettings, surroundings: Surroundings) -> Service:
    """The denoiser with its models loaded.

    Raises:
        CheckpointError: a model's weights can't be loaded.
    """
    device = configure_torch(settings.device, settings.threads)
    entries = load_manifest(settings.manifest)
    engine = DenoiserEngine(load_models(entries, LOADERS, device), settings.batch_cfg)
    models = {name: _describe(name, model, settings) for name, model in engine.models.items()}
    executor = DeviceExecutor("denoiser")
    scheduler = StepScheduler[DenoiseJob](settings.max_running, settings.max_batch_rows, settings.queue_capacity)
    loop = DenoiseLoop(engine, scheduler, executor, surroundings.metrics)
    denoising = Denoising(
        engine, loop, executor, surroundings.reader(settings), surroundings.store, surroundings.metrics, models
    )
    servicer = DenoiserServicer(denoising)

    async def start(address: str) -> None:
        surroundings.store.advertise(address)
        loop.start()

    async def close() -> None:
        await loop.close()
        executor.close()
        await surroundings.channels.close()

    mounts = stage_mounts(surroundings.store, list(models.values()))
    mounts["safelight.v1.DenoiserService"] = lambda server: (
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(servicer, server)
    )
    return Service("denoiser", mounts, tuple(models), start, close)


def _describe(name: str, model: Denoiser, settings: DenoiserSettings) -> ModelDescription:
    description = model.describe(name)
    description.denoiser.max_latent_area = settings.max_latent_area
    description.denoiser.max_steps = settings.max_steps
    return description
