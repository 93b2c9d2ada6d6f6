"""Puts the denoiser together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from safelight.v1 import denoiser_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.availability import Availability, Listener
from services.common.executor import DeviceExecutor
from services.common.server import Service
from services.common.stage import Surroundings, served_models, stage_mounts
from services.denoiser.checkpoints import CheckpointWriter
from services.denoiser.cost_curve import StepCosts
from services.denoiser.denoising import Denoising
from services.denoiser.engine import DenoiserEngine
from services.denoiser.initial_picture import INPUTS
from services.denoiser.job import DenoiseJob
from services.denoiser.load import report_load
from services.denoiser.loop import DenoiseLoop
from services.denoiser.preparation import Preparation
from services.denoiser.ranks.group import restarting_error
from services.denoiser.ranks.loading import RankLoading
from services.denoiser.registry import Denoiser
from services.denoiser.sampling.sampler import calls_per_step
from services.denoiser.scheduler import SchedulerLimits, StepScheduler
from services.denoiser.servicer import DenoiserServicer
from services.denoiser.settings import DenoiserSettings, parse_tenant_weights
from services.denoiser.warm_up import warm_up
from services.modeling.components import configure_torch
from services.modeling.device_use import DeviceUse
from services.modeling.loading import load_stage
from services.modeling.lora.library import AdapterLibrary
from services.modeling.lora.servicer import adapter_mount


def build_denoiser(settings: DenoiserSettings, surroundings: Surroundings) -> Service:
    """The denoiser with its models loaded.

    Raises:
        CheckpointError: a model's weights, or a LoRA of the manifest, can't be loaded.
        SettingsError: a tenant's weight can't be read.
    """
    device = configure_torch(settings.device, settings.threads)
    entries = served_models(settings)
    availability = Availability()
    loading = RankLoading(settings, surroundings.metrics, availability)
    loaded = load_stage("denoiser", entries, loading.loaders(), device, from_hub=settings.fetch)
    engine = DenoiserEngine(loaded, settings.batch_cfg, settings.max_fused_bytes)
    models = {name: _describe(name, model, settings) for name, model in engine.models.items()}
    executor = DeviceExecutor("denoiser")
    library = AdapterLibrary(loading.networks, executor, models, settings, surroundings.metrics)
    library.load_manifest(entries)
    limits = SchedulerLimits(settings.max_running, settings.max_batch_rows, settings.queue_capacity)
    costs = StepCosts()
    scheduler = StepScheduler[DenoiseJob](limits, costs, parse_tenant_weights(settings.tenant_weights))
    device_use = DeviceUse("denoiser", engine.models, surroundings.metrics)
    loop = DenoiseLoop(engine, scheduler, executor, surroundings.metrics, device_use.leave)
    reader, store = surroundings.reader(settings), surroundings.store
    checkpoints = CheckpointWriter(store, surroundings.metrics)
    preparation = Preparation(engine, executor, reader, models, checkpoints.costs, store.exchange_id, library)
    denoising = Denoising(engine, loop, preparation, checkpoints, store, surroundings.metrics, models)
    servicer = DenoiserServicer(denoising, settings.heartbeat_seconds)
    availability.listen(_hand_back(models, loop))

    async def start(address: str) -> None:
        surroundings.advertise(address)
        if settings.warm_up_steps > 0:
            await executor.run(lambda: _warm_up(engine, models, costs, settings))
        loop.start()

    async def close() -> None:
        await loop.close()
        executor.close()
        availability.close()
        await asyncio.to_thread(loading.close)
        await surroundings.close()

    capacity = settings.max_running + settings.queue_capacity
    mounts = stage_mounts(store, list(models.values()), lambda: report_load(scheduler, costs, capacity, loop.draining))
    mounts["safelight.v1.AdapterService"] = adapter_mount(library)
    mounts["safelight.v1.DenoiserService"] = lambda server: (
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(servicer, server)
    )
    return Service(
        "denoiser",
        mounts,
        tuple(models),
        start,
        close,
        drain=loop.drain,
        until_fetched=store.until_empty,
        availability=availability,
    )


def _hand_back(models: Mapping[str, ModelDescription], loop: DenoiseLoop) -> Listener:
    """While a model is started again, its description says so, and nobody waits here for it."""

    def changed(name: str, is_there: bool) -> None:
        models[name].restarting = not is_there
        if not is_there:
            loop.hand_back(name, restarting_error(name, "a rank was lost"))

    return changed


def _warm_up(
    engine: DenoiserEngine, models: Mapping[str, ModelDescription], costs: StepCosts, settings: DenoiserSettings
) -> None:
    warm_up(
        engine,
        models,
        costs,
        steps=settings.warm_up_steps,
        seconds=settings.warm_up_seconds,
        max_rows=settings.max_batch_rows,
    )


def _describe(name: str, model: Denoiser, settings: DenoiserSettings) -> ModelDescription:
    description = model.describe(name)
    description.denoiser.max_latent_area = settings.max_latent_area
    description.denoiser.max_steps = settings.max_steps
    description.denoiser.calls_per_step.update(calls_per_step(model.sampling.samplers))
    if not description.denoiser.default_latent_frames:
        description.denoiser.inputs.extend(INPUTS)
    return description
