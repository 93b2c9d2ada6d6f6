"""GenerationService: unpack, call, number the events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from gateway.generation import Generation
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import generation_service_pb2_grpc as pb_grpc
from services.common.request_context import Context


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The public API."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        sequence = 0
        async with aclosing(self._generation.run(request, context.time_remaining())) as events:
            async for event in events:
                sequence += 1
                event.sequence = sequence
                yield event
