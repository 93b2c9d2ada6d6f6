"""The newest checkpoint of a picture, kept at the gateway so that it outlives the denoiser that made it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from gateway.leases import Leases
from safelight.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
)
from safelight.v1.tensor_pb2 import TensorHeader, TensorRef
from safelight.v1.work_pb2 import Checkpoint
from services.common.exchange import Payload, TensorReader, TensorStore
from services.common.metrics import Metrics

_log = logging.getLogger("safelight.checkpoints")
_FIELD = "resume_from"


@dataclass(frozen=True)
class _Kept:
    """A checkpoint whose bytes are here."""

    step: int
    header: TensorHeader
    payload: Payload

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.payload.buffer().nbytes


@dataclass
class Checkpoints:
    """Fetches each checkpoint of a picture as soon as it is announced, and keeps the newest.

    Args:
        reader: fetches them.
        store: hands them out to the next denoiser.
        leases: tells the denoiser that one has been fetched.
        metrics: where the bytes kept are shown.
    """

    reader: TensorReader
    store: TensorStore
    leases: Leases
    metrics: Metrics
    _kept: _Kept | None = None
    _announced: Checkpoint | None = None
    _fetching: asyncio.Task[None] | None = None
    _handed_out: list[TensorRef] = field(default_factory=list)

    def announce(self, checkpoint: Checkpoint) -> None:
        """A denoiser has made one. It is fetched in the background; one that waits to be fetched gives way to it."""
        if self._announced is not None:
            self.leases.release([self._announced.sampler_state])
        self._announced = checkpoint
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch(), name="checkpoint")

    async def settle(self, seconds: float) -> None:
        """Returns when the announced ones are here, or can't be had, or time is up."""
        if self._fetching is None:
            return
        await asyncio.wait((self._fetching,), timeout=seconds)
        self._fetching.cancel()

    async def newest(self) -> Checkpoint | None:
        """What the next denoiser goes on from; None: it starts from noise."""
        if self._kept is None:
            return None
        ref = await self.store.put(self._kept.header, self._kept.payload)
        self._handed_out.append(ref)
        return Checkpoint(step=self._kept.step, sampler_state=ref)

    def drop(self) -> None:
        """Forget what is kept: a denoiser has refused it."""
        self._keep(None)

    def close(self) -> None:
        """Give everything back; the picture has ended."""
        if self._fetching is not None:
            self._fetching.cancel()
        if self._announced is not None:
            self.leases.release([self._announced.sampler_state])
        self.store.release(ref.lease.ticket for ref in self._handed_out)
        self.drop()

    async def _fetch(self) -> None:
        while self._announced is not None:
            checkpoint, self._announced = self._announced, None
            ref = checkpoint.sampler_state
            try:
                payload = await self.reader.read(ref, "checkpoint")
            except SafelightError as error:
                _log.info("checkpoint lost: %s", error.message)
            else:
                self._keep(_Kept(checkpoint.step, ref.header, payload))
            finally:
                self.leases.release([ref])

    def _keep(self, kept: _Kept | None) -> None:
        before = self._kept.size if self._kept is not None else 0
        self._kept = kept
        self.metrics.checkpoint_bytes.inc((kept.size if kept is not None else 0) - before)


def is_refused(checkpoint: Checkpoint, error: SafelightError) -> bool:
    """Whether a denoiser failed because of the checkpoint that it was to go on from."""
    lease = checkpoint.sampler_state.lease
    if isinstance(error, InvalidRequestError):
        return any(violation.field.startswith(_FIELD) for violation in error.violations)
    if isinstance(error, (FingerprintMismatchError, TensorCorruptError)):
        return error.metadata.get("field", "").startswith(_FIELD)
    if isinstance(error, LeaseExpiredError):
        return bool(lease.ticket) and error.metadata.get("ticket") == lease.ticket
    return isinstance(error, StageUnavailableError) and error.metadata.get("endpoint", "") == lease.endpoint != ""
