"""One call to one replica of each stage: message in, message out, events on the way.

Each call picks its replica, waits for one if none is healthy, counts as that replica's outstanding work, and carries
the request's deadline. A replica that can't be reached, stops, falls silent, or has other weights than before is left
out until its next good probe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import grpc

from gateway.catalog import Stages
from gateway.replicas import Replica, ReplicaSet
from gateway.settings import GatewaySettings
from gateway.watch import SilenceError, answer_within, events_within
from gateway.work import Work, decode_work, denoise_work, encode_work
from safelight.errors import (
    DeadlineExceededError,
    FingerprintMismatchError,
    ModelRestartingError,
    SafelightError,
    StageDrainingError,
    StageUnavailableError,
    UnknownAdapterError,
    UnknownModelError,
    from_rpc_error,
)
from safelight.v1.decoder_service_pb2 import (
    DecodeRequest,
    DecodeResponse,
    EncodeFilmRequest,
    EncodeFilmResponse,
    EncodeImageRequest,
    EncodeImageResponse,
)
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from safelight.v1.work_pb2 import WorkContext

_LOOK_SECONDS = 0.02
Loss = Literal["death", "silence", "drain", "restart"]


class StageCallError(Exception):
    """A stage call failed.

    Args:
        error: what the stage said, or what is to be said of it.
        replica: who was called.
        loss: how the replica was lost: it could not be reached, fell silent, is stopping, or starts the model again;
            None: it is still there.
    """

    def __init__(self, error: SafelightError, replica: Replica, loss: Loss | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.replica = replica
        self.loss = loss


@dataclass(frozen=True)
class StageCalls:
    """Calls of one request to the stages.

    Args:
        stages: the replicas.
        settings: how long to wait for whom.
        deadline: `time.monotonic()` by when the request must be done; None: no limit.
        given: told the stage whenever a replica of it is given work.
    """

    stages: Stages
    settings: GatewaySettings
    deadline: float | None
    given: Callable[[str], None]

    def remaining_seconds(self) -> float | None:
        """Time left; None: no limit."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.001)

    async def encode(self, request: EncodeRequest, avoid: Collection[Replica]) -> EncodeResponse:
        """The conditioning of a request's prompts."""
        async with self._call(self.stages.encoder, request.context, encode_work(request), avoid) as replica:
            answer = EncoderServiceStub(replica.channel).Encode(request, timeout=self.remaining_seconds())
            response = await answer_within(answer, self.settings.encode_seconds, lambda: replica.silent)
            response.timing.replica = replica.address
            return response

    async def encode_image(
        self, request: EncodeImageRequest, work: Work, avoid: Collection[Replica]
    ) -> EncodeImageResponse:
        """The latent of a request's input picture."""
        async with self._call(self.stages.decoder, request.context, work, avoid) as replica:
            answer = DecoderServiceStub(replica.channel).EncodeImage(request, timeout=self.remaining_seconds())
            response = await answer_within(answer, self.settings.decode_seconds, lambda: replica.silent)
            response.timing.replica = replica.address
            return response

    async def encode_film(
        self, request: EncodeFilmRequest, work: Work, avoid: Collection[Replica]
    ) -> EncodeFilmResponse:
        """The latents of a film, or of keyframes; it may take its time for each latent frame."""
        async with self._call(self.stages.decoder, request.context, work, avoid) as replica:
            answer = DecoderServiceStub(replica.channel).EncodeFilm(request, timeout=self.remaining_seconds())
            patience = self.settings.decode_seconds * work.passes
            response = await answer_within(answer, patience, lambda: replica.silent)
            response.timing.replica = replica.address
            return response

    async def denoise(
        self, request: DenoiseRequest, calls_per_step: int, avoid: Collection[Replica]
    ) -> AsyncGenerator[DenoiseResponse, None]:
        """What happens to one picture's latent; the last event is its result."""
        work = denoise_work(request, calls_per_step)
        async with self._call(self.stages.denoiser, request.context, work, avoid) as replica:
            call = DenoiserServiceStub(replica.channel).Denoise(request, timeout=self.remaining_seconds())
            async with aclosing(events_within(call, self.settings.silence_seconds)) as events:
                async for event in events:
                    if event.HasField("result"):
                        event.result.timing.replica = replica.address
                    yield event

    async def decode(self, request: DecodeRequest, avoid: Collection[Replica]) -> AsyncGenerator[DecodeResponse, None]:
        """The file of one picture in chunks, then its result."""
        async with self._call(self.stages.decoder, request.context, decode_work(request), avoid) as replica:
            call = DecoderServiceStub(replica.channel).Decode(request, timeout=self.remaining_seconds())
            async with aclosing(events_within(call, self.settings.decode_seconds, lambda: replica.silent)) as events:
                async for event in events:
                    if event.HasField("result"):
                        event.result.timing.replica = replica.address
                    yield event

    @asynccontextmanager
    async def _call(
        self, stage: ReplicaSet, context: WorkContext, work: Work, avoid: Collection[Replica]
    ) -> AsyncIterator[Replica]:
        """Picks a replica and turns what goes wrong with the call into StageCallError."""
        replica = await self._pick(stage, context.fingerprints.get(stage.stage, ""), work, avoid)
        try:
            with replica.work(work):
                self.given(stage.stage)
                yield replica
        except SilenceError as silence:
            stage.report_failure(replica)
            error = StageUnavailableError(
                f"the {stage.stage} at {replica.address} has fallen silent", stage=stage.stage
            )
            raise StageCallError(error, replica, "silence") from silence
        except grpc.aio.AioRpcError as failure:
            known = from_rpc_error(failure)
            loss = _loss(known)
            if loss == "restart":
                replica.note_restart(work.model)
            elif loss is not None or _has_other_weights(known):
                stage.report_failure(replica)
            raise StageCallError(known, replica, loss) from failure

    async def _pick(self, stage: ReplicaSet, fingerprint: str, work: Work, avoid: Collection[Replica]) -> Replica:
        """A replica for a piece of work, as soon as there is one.

        Raises:
            StageUnavailableError, UnknownModelError, UnknownAdapterError: there was none for as long as work waits.
            FingerprintMismatchError: the weights that the request was planned with are served no more.
            DeadlineExceededError: time was up before there was one.
        """
        began = time.monotonic()
        while True:
            try:
                return stage.pick(work.model, avoid, fingerprint, work)
            except (StageUnavailableError, UnknownModelError, UnknownAdapterError) as error:
                now = time.monotonic()
                if self.deadline is not None and now >= self.deadline:
                    raise DeadlineExceededError(f"time was up while waiting: {error.message}") from error
                if now >= began + self._patience(error):
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    def _patience(self, error: SafelightError) -> float:
        """Seconds for which a piece of work waits for a replica."""
        if isinstance(error, ModelRestartingError):
            return self.settings.restart_wait_seconds
        return self.settings.replica_wait_seconds


def _has_other_weights(error: SafelightError) -> bool:
    """Whether the replica was started again, with other weights or adapters than its last probe has told."""
    is_mismatch = isinstance(error, FingerprintMismatchError) and error.metadata.get("field", "").startswith("context.")
    return is_mismatch or isinstance(error, UnknownAdapterError)


def _loss(error: SafelightError) -> Loss | None:
    """UNAVAILABLE without details is gRPC's own word; with details it is the stage speaking of something else."""
    if isinstance(error, StageDrainingError):
        return "drain"
    if isinstance(error, ModelRestartingError):
        return "restart"
    return "death" if isinstance(error, StageUnavailableError) and not error.metadata else None
