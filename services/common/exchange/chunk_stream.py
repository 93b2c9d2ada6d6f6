"""The chunk stream: a leased tensor's bytes over gRPC, which go on from where they broke."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

import grpc

from safelight.errors import (
    LeaseExpiredError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
    from_rpc_error,
)
from safelight.v1 import tensor_exchange_service_pb2 as pb
from safelight.v1.tensor_pb2 import TensorLease
from services.common.channels import ChannelPool
from services.common.exchange.chunk_messages import read_chunk
from services.common.exchange.digests import running_digest
from services.common.metrics import Metrics

PULL = "/safelight.v1.TensorExchangeService/Pull"
ATTEMPTS = 3
"""Times that a pull is begun or continued before it is an error."""
PAUSE_SECONDS = 0.05
"""Pause before a broken pull goes on; doubled each time."""
SILENCE_SECONDS = 4.0
"""A holder that sends nothing for so long has gone silent."""

_log = logging.getLogger("safelight.exchange")


@dataclass(frozen=True)
class ChunkStream:
    """Pulls tensors from the processes that hold them, over connections of their own.

    Args:
        channels: connections to other stages.
        metrics: where the continued pulls are counted.
    """

    channels: ChannelPool
    metrics: Metrics

    async def pull(self, lease: TensorLease, buffer: memoryview, field: str) -> bytes:
        """Fill the buffer; returns the digest of what came. A pull that breaks goes on from where it broke.

        Raises:
            LeaseExpiredError: the holder has dropped the tensor.
            StageUnavailableError: the holder can't be reached, or has gone silent.
            TensorCorruptError: more or fewer bytes came than the buffer has; `field` names the tensor.
        """
        arrival = _Arrival(buffer, field)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._pull_rest(lease, arrival)
                return arrival.finish()
            except grpc.aio.AioRpcError as error:
                if attempt == ATTEMPTS or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise _explain(error, lease, field) from error
            _log.info("pull broke at byte %d and goes on", arrival.filled, extra={"endpoint": lease.endpoint})
            self.metrics.pulls_continued.inc()
            await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    async def _pull_rest(self, lease: TensorLease, arrival: _Arrival) -> None:
        channel = self.channels.bulk(lease.endpoint)
        start: grpc.aio.UnaryStreamMultiCallable[pb.PullRequest, bytes] = channel.unary_stream(
            PULL, pb.PullRequest.SerializeToString
        )
        call = start(pb.PullRequest(ticket=lease.ticket, offset=arrival.filled))
        silence = asyncio.create_task(_cancel_when_silent(call, arrival))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                arrival.add(read_chunk(cast("bytes", message)))
        except asyncio.CancelledError:
            if not silence.done():
                raise
            raise StageUnavailableError(
                f"{arrival.field}: its holder at {lease.endpoint} has gone silent: run that stage again",
                endpoint=lease.endpoint,
            ) from None
        finally:
            silence.cancel()
            call.cancel()


async def _cancel_when_silent(call: grpc.aio.UnaryStreamCall[pb.PullRequest, bytes], arrival: _Arrival) -> None:
    """Ends a call that brings nothing for SILENCE_SECONDS, or up to twice that; cheaper than a time-out a chunk."""
    seen = -1
    while arrival.filled != seen:
        seen = arrival.filled
        await asyncio.sleep(SILENCE_SECONDS)
    call.cancel()


class _Arrival:
    """How far a tensor has come in."""

    def __init__(self, buffer: memoryview, field: str) -> None:
        self.field = field
        self.filled = 0
        self._buffer = buffer
        self._digest = running_digest()

    def add(self, chunk: memoryview) -> None:
        end = self.filled + chunk.nbytes
        if end > self._buffer.nbytes:
            raise TensorCorruptError(
                f"{self.field}: more bytes arrived than the {self._buffer.nbytes} of its header", field=self.field
            )
        self._buffer[self.filled : end] = chunk
        self._digest.update(chunk)  # while it is in the processor's cache
        self.filled = end

    def finish(self) -> bytes:
        if self.filled < self._buffer.nbytes:
            raise TensorCorruptError(
                f"{self.field}: {self.filled} of {self._buffer.nbytes} bytes arrived; pull it again", field=self.field
            )
        return self._digest.digest()


def _explain(error: grpc.aio.AioRpcError, lease: TensorLease, field: str) -> SafelightError:
    """Whatever else the holder says, and whoever it is: the tensor can't be had from there."""
    known = from_rpc_error(error)
    if isinstance(known, LeaseExpiredError):
        return known
    return StageUnavailableError(
        f"{field}: its holder at {lease.endpoint!r} can't be reached ({known.message}): run that stage again",
        endpoint=lease.endpoint,
    )
