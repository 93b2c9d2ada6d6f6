"""DenoiserService: unpack, call, number the events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1 import denoiser_service_pb2_grpc as pb_grpc
from services.common.request_context import Context
from services.denoiser.denoising import Denoising
from services.denoiser.heartbeat import with_heartbeats


class DenoiserServicer(pb_grpc.DenoiserServiceServicer):
    """Streams what happens to a request, with a heartbeat wherever nothing does for `heartbeat_seconds`."""

    def __init__(self, denoising: Denoising, heartbeat_seconds: float) -> None:
        self._denoising = denoising
        self._heartbeat_seconds = heartbeat_seconds

    async def Denoise(self, request: pb.DenoiseRequest, context: Context) -> AsyncIterator[pb.DenoiseResponse]:
        sequence = 0
        happenings = self._denoising.run(request, context.time_remaining())
        async with aclosing(with_heartbeats(happenings, self._heartbeat_seconds)) as events:
            async for event in events:
                sequence += 1
                event.sequence = sequence
                yield event
