"""One call to one replica of each stage: message in, message out, progress on the way.

Each call picks its replica, counts as that replica's outstanding work, and carries the request's deadline. A replica
that can't be reached is left out from then on.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from gateway.catalog import Stages
from gateway.replicas import Replica, ReplicaSet
from gateway.work import Work, decode_work, denoise_work, encode_work
from safelight.errors import InternalError, SafelightError, from_rpc_error
from safelight.v1 import (
    decoder_service_pb2,
    decoder_service_pb2_grpc,
    denoiser_service_pb2,
    denoiser_service_pb2_grpc,
    encoder_service_pb2,
    encoder_service_pb2_grpc,
)


class StageCallError(Exception):
    """A stage call failed.

    Args:
        error: what the stage said.
        replica: who said it.
        unreachable: the replica itself could not be reached, or is stopping.
    """

    def __init__(self, error: SafelightError, replica: Replica, unreachable: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.replica = replica
        self.unreachable = unreachable


@dataclass(frozen=True)
class StageCalls:
    """Calls of one request to the stages.

    Args:
        stages: the replicas.
        deadline: `time.monotonic()` by when the request must be done; None: no limit.
        given: told the stage whenever a replica of it is given work.
    """

    stages: Stages
    deadline: float | None
    given: Callable[[str], None]

    def remaining_seconds(self) -> float | None:
        """Time left; None: no limit."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.001)

    async def encode(
        self, request: encoder_service_pb2.EncodeRequest, avoid: Collection[Replica], limit_seconds: float
    ) -> encoder_service_pb2.EncodeResponse:
        """The conditioning of a request's prompts."""
        with self._call(self.stages.encoder, encode_work(request), avoid) as replica:
            stub = encoder_service_pb2_grpc.EncoderServiceStub(replica.channel)
            remaining = self.remaining_seconds()
            timeout = limit_seconds if remaining is None else min(remaining, limit_seconds)
            response = await stub.Encode(request, timeout=timeout)
            response.timing.replica = replica.address
            return response

    async def denoise(
        self,
        request: denoiser_service_pb2.DenoiseRequest,
        avoid: Collection[Replica],
        report: Callable[[denoiser_service_pb2.DenoiseResponse], Awaitable[None]],
    ) -> denoiser_service_pb2.DenoiseResult:
        """The latent of one picture; every event before the result goes to `report`."""
        with self._call(self.stages.denoiser, denoise_work(request), avoid) as replica:
            stub = denoiser_service_pb2_grpc.DenoiserServiceStub(replica.channel)
            async for event in stub.Denoise(request, timeout=self.remaining_seconds()):
                if event.HasField("result"):
                    event.result.timing.replica = replica.address
                    return event.result
                await report(event)
        raise InternalError(f"the denoiser at {replica.address} ended its stream without a result")

    async def decode(
        self, request: decoder_service_pb2.DecodeRequest, avoid: Collection[Replica]
    ) -> AsyncGenerator[decoder_service_pb2.DecodeResponse, None]:
        """The file of one picture in chunks, then its result."""
        with self._call(self.stages.decoder, decode_work(request), avoid) as replica:
            stub = decoder_service_pb2_grpc.DecoderServiceStub(replica.channel)
            async for event in stub.Decode(request, timeout=self.remaining_seconds()):
                if event.HasField("result"):
                    event.result.timing.replica = replica.address
                yield event

    @contextmanager
    def _call(self, stage: ReplicaSet, work: Work, avoid: Collection[Replica]) -> Iterator[Replica]:
        """Picks a replica and turns what gRPC raises into StageCallError."""
        replica = stage.pick(work.model, avoid, work=work)
        try:
            with replica.work(work):
                self.given(stage.stage)
                yield replica
        except grpc.aio.AioRpcError as error:
            unreachable = _is_unreachable(error)
            if unreachable:
                stage.report_failure(replica)
            raise StageCallError(from_rpc_error(error), replica, unreachable) from error


def _is_unreachable(error: grpc.aio.AioRpcError) -> bool:
    """UNAVAILABLE without details is gRPC's own word; with details it is the stage speaking of something else."""
    return error.code() == grpc.StatusCode.UNAVAILABLE and not from_rpc_error(error).metadata
