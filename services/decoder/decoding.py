"""The life of one decode (or encode) request: check, fetch, queue, compute, write the file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from torch import Tensor

from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import OUTPUT_FORMAT_LATENTS, StageTiming
from services.common.batch_costs import WorkKind
from services.common.exchange import TensorReader, TensorStore
from services.common.fingerprints import check_own_fingerprint, check_tensor_fingerprint
from services.common.metrics import Metrics
from services.common.model_servicer import find_model
from services.common.picture_files import PictureLimits
from services.common.received_bytes import received_bytes
from services.decoder.device_work import DeviceWork
from services.decoder.file_stream import stream_file
from services.decoder.film_decoding import FilmDecoding
from services.decoder.film_encoding import FilmEncoding
from services.decoder.images import to_pixels
from services.decoder.input_films import keyframe_indices
from services.decoder.input_pictures import paste_original, read_input
from services.decoder.output_files import OutputFile, latents_file, picture_file
from services.decoder.registry import PictureDecoder
from services.decoder.tiling import Tiling
from services.decoder.validation import check_decode, check_encode_film, check_encode_image
from services.modeling.wire import TorchPayload, check_finite, make_header, read_tensor

_UPLOADS_READ_AT_ONCE = 2  # a small file may hold many pixels


@dataclass(frozen=True)
class Decoding:
    """Runs requests against the device that all of them share."""

    pictures: Mapping[str, PictureDecoder]
    films: FilmDecoding
    film_encoding: FilmEncoding
    device: DeviceWork
    reader: TensorReader
    store: TensorStore
    metrics: Metrics
    models: dict[str, ModelDescription]
    tiling: Tiling
    limits: PictureLimits
    _reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_UPLOADS_READ_AT_ONCE))

    async def decode(self, request: pb.DecodeRequest) -> AsyncGenerator[pb.DecodeResponse, None]:
        """A film's progress, the file's chunks, then the result.

        Raises:
            SafelightError: of the kinds that DecoderService.Decode documents.
        """
        description = find_model(self.models, request.model).decoder
        check_decode(request, description)
        check_own_fingerprint(request.context, "decoder", description.fingerprint)
        check_tensor_fingerprint(request.context, "denoiser", request.latents.header, "latents")
        latents = await read_tensor(self.reader, request.latents, "latents")
        received = received_bytes([request.latents], self.store.exchange_id)
        async with aclosing(await self._make(request, latents)) as events:
            async for event in events:
                if event.HasField("result"):
                    event.result.timing.received_bytes = received
                yield event

    async def encode_image(self, request: pb.EncodeImageRequest) -> pb.EncodeImageResponse:
        """The scaled latents of a picture file, and its mask at their size.

        Raises:
            SafelightError: of the kinds that DecoderService.EncodeImage documents.
        """
        description = find_model(self.models, request.model).decoder
        check_encode_image(request, description, self.limits.max_pixels)
        check_own_fingerprint(request.context, "decoder", description.fingerprint)
        async with self._reading:
            image, mask = await asyncio.to_thread(read_input, request, description, self.limits)
        decoder = self.pictures[request.model]
        kind = WorkKind(request.model, tuple(side // description.scale_factor for side in image.shape[-2:]))
        latents, timing = await self.device.compute(kind, lambda: decoder.encode(image, self.tiling))
        check_finite(latents, "the encoded picture")
        leased = await self._lease(latents, "BCHW", decoder.fingerprint)
        response = pb.EncodeImageResponse(latents=leased, timing=timing)
        if mask is not None:
            response.mask.CopyFrom(await self._lease(mask, "BCHW"))
        return response

    async def encode_film(self, request: pb.EncodeFilmRequest) -> pb.EncodeFilmResponse:
        """The normalised latents of a film, or of keyframes amid grey.

        Raises:
            SafelightError: of the kinds that DecoderService.EncodeFilm documents.
        """
        description = find_model(self.models, request.model).decoder
        check_encode_film(request, description, self.film_encoding.films)
        check_own_fingerprint(request.context, "decoder", description.fingerprint)
        latents, timing = await self.film_encoding.run(request, description)
        return pb.EncodeFilmResponse(
            latents=await self._lease(latents, "BCTHW", description.fingerprint),
            timing=timing,
            keyframe_indices=keyframe_indices(len(request.keyframes), request.num_frames),
        )

    async def _lease(self, tensor: Tensor, layout: str, fingerprint: str = "") -> TensorRef:
        return await self.store.put(make_header(tensor, layout, fingerprint), TorchPayload(tensor))

    async def _make(self, request: pb.DecodeRequest, latents: Tensor) -> AsyncGenerator[pb.DecodeResponse, None]:
        """The events of a checked request."""
        if request.output.format == OUTPUT_FORMAT_LATENTS:
            return stream_file(latents_file(latents), StageTiming(stage="decoder"))
        if self.models[request.model].decoder.frames_per_latent:
            return self.films.run(request, latents)
        return stream_file(*await self._picture(request, latents))

    async def _picture(self, request: pb.DecodeRequest, latents: Tensor) -> tuple[OutputFile, StageTiming]:
        decoder = self.pictures[request.model]
        kind = WorkKind(request.model, tuple(latents.shape[1:]))
        image, timing = await self.device.compute(kind, lambda: decoder.decode(latents, self.tiling))
        check_finite(image, "the decoded picture")
        pixels = await asyncio.to_thread(to_pixels, image[0])
        if request.mask:
            async with self._reading:
                pixels = await asyncio.to_thread(paste_original, pixels, request, self.limits)
        return await asyncio.to_thread(picture_file, pixels, request.output, request.parameters), timing
