"""Puts the encoder together."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.v1 import encoder_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.batching import BatchLimits
from services.common.executor import DeviceExecutor
from services.common.server import Service
from services.common.stage import Surroundings, served_models, stage_mounts
from services.encoder.embedding_cache import EmbeddingCache
from services.encoder.encoding import ConditioningTensors, EncoderBatcher, EncoderJob, Encoding, encode_batch
from services.encoder.registry import LOADERS, PromptEncoder
from services.encoder.servicer import EncoderServicer
from services.encoder.settings import EncoderSettings
from services.modeling.components import configure_torch
from services.modeling.device_use import DeviceUse
from services.modeling.loading import load_stage
from services.modeling.lora.layouts import TEXT_ENCODERS
from services.modeling.lora.library import AdapterLibrary
from services.modeling.lora.reading import StageNetworks
from services.modeling.lora.servicer import adapter_mount


def build_encoder(settings: EncoderSettings, surroundings: Surroundings) -> Service:
    """The encoder with its models loaded.

    Raises:
        CheckpointError: a model's weights, or a LoRA of the manifest, can't be loaded.
    """
    device = configure_torch(settings.device, settings.threads)
    entries = served_models(settings)
    encoders = load_stage("encoder", entries, LOADERS, device, from_hub=settings.fetch)
    models = {name: _describe(name, encoder, settings) for name, encoder in encoders.items()}
    executor = DeviceExecutor("encoder")
    networks = {name: StageNetworks(encoder.networks, TEXT_ENCODERS) for name, encoder in encoders.items()}
    library = AdapterLibrary(networks, executor, models, settings, surroundings.metrics)
    library.load_manifest(entries)

    device_use = DeviceUse("encoder", encoders, surroundings.metrics)

    async def run(jobs: Sequence[EncoderJob]) -> Sequence[ConditioningTensors]:
        return await executor.run(lambda: device_use.run(lambda: encode_batch(encoders, jobs), batcher.is_idle))

    limits = BatchLimits(settings.max_batch_prompts, settings.batch_wait_seconds, settings.queue_capacity)
    batcher = EncoderBatcher("encoder", run, limits, surroundings.metrics)
    cache = EmbeddingCache(settings.cache_bytes)
    servicer = EncoderServicer(
        Encoding(encoders, batcher, executor, cache, surroundings.store, surroundings.metrics, models, library)
    )

    async def start(address: str) -> None:
        surroundings.advertise(address)
        batcher.start()

    async def close() -> None:
        await batcher.close()
        executor.close()
        await surroundings.close()

    mounts = stage_mounts(surroundings.store, list(models.values()), batcher.load)
    mounts["safelight.v1.AdapterService"] = adapter_mount(library)
    mounts["safelight.v1.EncoderService"] = lambda server: (
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    )
    return Service("encoder", mounts, tuple(models), start, close, until_fetched=surroundings.store.until_empty)


def _describe(name: str, encoder: PromptEncoder, settings: EncoderSettings) -> ModelDescription:
    description = encoder.describe(name)
    description.encoder.max_prompt_bytes = settings.max_prompt_bytes
    return description
