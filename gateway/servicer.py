"""GenerationService: unpack, call, pack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from gateway.requests import Requests
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import generation_service_pb2_grpc as pb_grpc
from services.common.request_context import Context


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The public API."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with aclosing(self._requests.attach(request, context.time_remaining())) as events:
            async for event in events:
                yield event

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self._requests.cancel(request.context)
        return pb.CancelResponse()
