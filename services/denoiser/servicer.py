"""DenoiserService: unpack, call, pack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1 import denoiser_service_pb2_grpc as pb_grpc
from services.common.request_context import Context
from services.denoiser.denoising import Denoising, Finished, Queued
from services.denoiser.job import StepDone


class DenoiserServicer(pb_grpc.DenoiserServiceServicer):
    """Streams what happens to a request."""

    def __init__(self, denoising: Denoising) -> None:
        self._denoising = denoising

    async def Denoise(self, request: pb.DenoiseRequest, context: Context) -> AsyncIterator[pb.DenoiseResponse]:
        sequence = 0
        async with aclosing(self._denoising.run(request)) as events:
            async for event in events:
                sequence += 1
                yield _to_response(event, sequence)


def _to_response(event: Queued | StepDone | Finished, sequence: int) -> pb.DenoiseResponse:
    if isinstance(event, Queued):
        return pb.DenoiseResponse(sequence=sequence, queued=pb.DenoiseQueued(position=event.position))
    if isinstance(event, Finished):
        return pb.DenoiseResponse(sequence=sequence, result=event.result)
    progress = pb.DenoiseProgress(
        step=event.step, steps=event.steps, step_seconds=event.seconds, batch_size=event.batch_size
    )
    return pb.DenoiseResponse(sequence=sequence, progress=progress)
