"""A film from its latents to its file: one latent frame is decoded on the device while the one before is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import StageTiming
from services.common.batch_costs import WorkKind
from services.common.executor import DeviceExecutor
from services.decoder.device_work import DeviceWork
from services.decoder.file_stream import stream_file
from services.decoder.film_files import FilmWriter, open_film_writer
from services.decoder.generation_parameters import parameters_text
from services.decoder.images import to_pixels
from services.decoder.output_files import OutputFile, embedded_parameters
from services.decoder.registry import FilmDecoder
from services.decoder.tiling import Tiling
from services.modeling.wire import check_finite

DEFAULT_FPS = 16.0


@dataclass(frozen=True)
class FilmDecoding:
    """Makes films.

    Args:
        decoders: by the name of their model.
        models: what they are.
        device: computes.
        tiling: of large frames.
    """

    decoders: Mapping[str, FilmDecoder]
    models: Mapping[str, ModelDescription]
    device: DeviceWork
    tiling: Tiling

    async def run(self, request: pb.DecodeRequest, latents: Tensor) -> AsyncGenerator[pb.DecodeResponse, None]:
        """The events of a checked request, whose latents are [1, C, T, h, w]: its progress, the file, the result.

        Other requests' work goes between the pieces. When the caller goes away, what is not decoded yet is left, and
        nothing of the film stays behind.

        Raises:
            NonFiniteError, OutOfMemoryError, InternalError: the film could not be decoded, or not written.
        """
        factor = self.models[request.model].decoder.scale_factor
        width, height = factor * latents.shape[-1], factor * latents.shape[-2]
        comment = "" if request.output.omit_metadata else parameters_text(embedded_parameters(request.parameters))
        fps = request.parameters.fps or DEFAULT_FPS
        writer = open_film_writer(request.output, (width, height), fps, comment)
        writing = DeviceExecutor("film")
        timing, frames, progress = StageTiming(stage="decoder"), 0, pb.DecodeProgress(steps=latents.shape[2])
        try:
            async with aclosing(self._pieces(request.model, latents, timing)) as pieces:
                async for piece in pieces:
                    await writing.run(partial(_write, writer, piece))
                    frames += len(piece)
                    progress.step += 1
                    yield pb.DecodeResponse(progress=progress)
            content = await writing.run(writer.finish)
            file = OutputFile(content, writer.media_type, width, height, frames)
            async with aclosing(stream_file(file, timing)) as events:
                async for event in events:
                    yield event
        finally:
            await asyncio.shield(writing.run(writer.discard))
            writing.close()

    async def _pieces(self, model: str, latents: Tensor, timing: StageTiming) -> AsyncGenerator[Tensor, None]:
        """The frames [n, 3, H, W] of each latent frame; while one is taken, the next is computed."""
        pieces = self.decoders[model].decode_film(latents, self.tiling)
        kind = WorkKind(model, (latents.shape[1], 1, *latents.shape[-2:]))
        following = asyncio.ensure_future(self.device.compute(kind, lambda: next(pieces)))
        try:
            for left in range(latents.shape[2] - 1, -1, -1):
                piece, spent = await following
                timing.queue_seconds += spent.queue_seconds
                timing.compute_seconds += spent.compute_seconds
                if left:
                    following = asyncio.ensure_future(self.device.compute(kind, lambda: next(pieces), admitted=True))
                yield piece
        finally:
            following.cancel()


def _write(writer: FilmWriter, frames: Tensor) -> None:
    """Hands frames [n, 3, H, W] about in [-1, 1] to the writer."""
    check_finite(frames, "the decoded film")
    writer.add(np.stack([to_pixels(frame) for frame in frames]))
