"""A film from its file, or its keyframes, to its latents: one piece is encoded on the device while the next is read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1.model_pb2 import DecoderDescription
from safelight.v1.work_pb2 import StageTiming
from services.common.batch_costs import WorkKind
from services.common.executor import DeviceExecutor
from services.common.picture_files import PictureLimits
from services.decoder.device_work import DeviceWork
from services.decoder.input_films import FilmFile, InputFilm, Keyframes, film_pieces
from services.decoder.registry import FilmDecoder
from services.decoder.tiling import Tiling
from services.decoder.validation import FilmLimits
from services.modeling.wire import check_finite

_FILMS_READ_AT_ONCE = 2  # each has an ffmpeg of its own


@dataclass(frozen=True)
class FilmEncoding:
    """Encodes films.

    Args:
        decoders: by the name of their model.
        device: computes.
        tiling: of large frames.
        pictures: what a keyframe may hold.
        films: what a film may hold.
    """

    decoders: Mapping[str, FilmDecoder]
    device: DeviceWork
    tiling: Tiling
    pictures: PictureLimits
    films: FilmLimits
    _reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_FILMS_READ_AT_ONCE))

    async def run(self, request: pb.EncodeFilmRequest, model: DecoderDescription) -> tuple[Tensor, StageTiming]:
        """The latents [1, C, T, h, w] of a checked request.

        Other requests' work goes between the pieces. When the caller goes away, what is not encoded yet is left, and
        nothing of the film stays behind, ffmpeg's process least of all.

        Raises:
            InvalidRequestError: the film, or a keyframe, can't be read.
            NonFiniteError, OutOfMemoryError, InternalError: it could not be encoded, or ffmpeg died.
        """
        async with self._reading:
            film, reading = self._open(request), DeviceExecutor("film")
            try:
                return await self._encode(film, request, model, reading)
            finally:
                film.stop()
                await asyncio.shield(reading.run(film.discard))
                reading.close()

    def _open(self, request: pb.EncodeFilmRequest) -> InputFilm:
        size, count = (request.width, request.height), request.num_frames
        if request.film:
            return FilmFile(request.film, size, count, self.films.max_frame_pixels)
        return Keyframes(request.keyframes, size, count, self.pictures)

    async def _encode(
        self, film: InputFilm, request: pb.EncodeFilmRequest, model: DecoderDescription, reading: DeviceExecutor
    ) -> tuple[Tensor, StageTiming]:
        pieces, read = film_pieces(film.frames(), model.frames_per_latent), deque[Tensor]()
        encoded = self.decoders[request.model].encode_film(iter(read.popleft, None), self.tiling)
        kind = WorkKind(request.model, (request.height // model.scale_factor, request.width // model.scale_factor))
        latents, timing = list[Tensor](), StageTiming(stage="decoder")
        piece = await reading.run(lambda: next(pieces, None))
        while piece is not None:
            read.append(piece)
            going_on = self.device.compute(kind, lambda: next(encoded), admitted=bool(latents))
            computing = asyncio.ensure_future(going_on)
            try:
                piece = await reading.run(lambda: next(pieces, None))
                latent, spent = await computing
            finally:
                computing.cancel()
            check_finite(latent, "the encoded film")
            latents.append(latent)
            timing.queue_seconds += spent.queue_seconds
            timing.compute_seconds += spent.compute_seconds
        return torch.cat(latents, dim=2), timing
