"""DecoderService: unpack, call, pack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1 import decoder_service_pb2_grpc as pb_grpc
from services.common.request_context import Context
from services.decoder.decoding import Decoding


class DecoderServicer(pb_grpc.DecoderServiceServicer):
    """Decodes latents to files, and encodes pictures and films to latents."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> AsyncIterator[pb.DecodeResponse]:
        async with aclosing(self._decoding.decode(request)) as responses:
            async for response in responses:
                yield response

    async def EncodeImage(self, request: pb.EncodeImageRequest, context: Context) -> pb.EncodeImageResponse:
        return await self._decoding.encode_image(request)

    async def EncodeFilm(self, request: pb.EncodeFilmRequest, context: Context) -> pb.EncodeFilmResponse:
        return await self._decoding.encode_film(request)
