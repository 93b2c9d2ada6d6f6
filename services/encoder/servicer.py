"""EncoderService: unpack, call, pack."""

from __future__ import annotations

from safelight.v1 import encoder_service_pb2 as pb
from safelight.v1 import encoder_service_pb2_grpc as pb_grpc
from services.common.request_context import Context
from services.encoder.encoding import Encoding


class EncoderServicer(pb_grpc.EncoderServiceServicer):
    """Encodes prompts."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        return await self._encoding.encode(request)
