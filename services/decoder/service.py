"""Puts the decoder together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safelight.v1 import decoder_service_pb2_grpc
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import OUTPUT_FORMAT_LATENTS
from services.common.batching import BatchLimits
from services.common.executor import DeviceExecutor
from services.common.picture_files import PictureLimits
from services.common.server import Service
from services.common.stage import Surroundings, served_models, stage_mounts
from services.decoder.decoding import Decoding
from services.decoder.device_work import Computation, DeviceQueue, DeviceWork, compute_on
from services.decoder.film_decoding import FilmDecoding
from services.decoder.film_encoding import FilmEncoding
from services.decoder.film_files import FILM_FORMATS
from services.decoder.output_files import FORMATS
from services.decoder.registry import LOADERS, Decoder, FilmDecoder, PictureDecoder
from services.decoder.servicer import DecoderServicer
from services.decoder.settings import DecoderSettings
from services.decoder.tiling import Tiling
from services.decoder.validation import FilmLimits
from services.modeling.components import configure_torch
from services.modeling.device_use import DeviceUse
from services.modeling.loading import load_stage


def build_decoder(settings: DecoderSettings, surroundings: Surroundings) -> Service:
    """The decoder with its models loaded.

    Raises:
        CheckpointError: a model's weights can't be loaded.
    """
    device = configure_torch(settings.device, settings.threads)
    decoders = load_stage("decoder", served_models(settings), LOADERS, device, from_hub=settings.fetch)
    models = {name: _describe(name, decoder) for name, decoder in decoders.items()}
    executor = DeviceExecutor("decoder")

    device_use = DeviceUse("decoder", decoders, surroundings.metrics)

    async def compute(computation: Computation) -> Tensor:
        return await compute_on(executor, lambda: device_use.run(computation, queue.is_idle))

    async def run(computations: Sequence[Computation]) -> Sequence[Tensor]:
        return [await compute(computation) for computation in computations]

    # Batching does not pay in a VAE: one picture fills the device. The batcher is the bounded queue.
    limits = BatchLimits(max_size=1, max_wait_seconds=0.0, capacity=settings.queue_capacity)
    queue = DeviceQueue("decoder", run, limits, surroundings.metrics)
    device_work = DeviceWork(queue, surroundings.metrics)
    tiling = Tiling(tile=settings.tile_size, overlap=settings.tile_overlap, untiled_area=settings.untiled_area)
    films = {name: decoder for name, decoder in decoders.items() if isinstance(decoder, FilmDecoder)}
    pictures = PictureLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    film_limits = FilmLimits(
        max_bytes=settings.max_film_bytes,
        max_frames=settings.max_film_frames,
        max_frame_pixels=settings.max_frame_pixels,
    )
    decoding = Decoding(
        {name: decoder for name, decoder in decoders.items() if isinstance(decoder, PictureDecoder)},
        FilmDecoding(films, models, device_work, tiling),
        FilmEncoding(films, device_work, tiling, pictures, film_limits),
        device_work,
        surroundings.reader(settings),
        surroundings.store,
        surroundings.metrics,
        models,
        tiling,
        pictures,
    )
    servicer = DecoderServicer(decoding)

    async def start(address: str) -> None:
        surroundings.advertise(address)
        queue.start()

    async def close() -> None:
        await queue.close()
        executor.close()
        await surroundings.close()

    mounts = stage_mounts(surroundings.store, list(models.values()), queue.load)
    mounts["safelight.v1.DecoderService"] = lambda server: (
        decoder_service_pb2_grpc.add_DecoderServiceServicer_to_server(servicer, server)
    )
    return Service("decoder", mounts, tuple(models), start, close, until_fetched=surroundings.store.until_empty)


def _describe(name: str, decoder: Decoder) -> ModelDescription:
    description = decoder.describe(name)
    makes_films = description.decoder.frames_per_latent > 0
    description.decoder.formats.extend((*FILM_FORMATS, OUTPUT_FORMAT_LATENTS) if makes_films else FORMATS)
    return description
