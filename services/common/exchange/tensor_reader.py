"""The consumer's side: references become tensors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from safelight.errors import OutOfMemoryError, TensorCorruptError
from safelight.tensors import byte_size, check_size
from safelight.v1.tensor_pb2 import TensorRef
from services.common.channels import ChannelPool
from services.common.exchange.buffer_pool import BufferPool
from services.common.exchange.chunk_messages import CHUNK_BYTES
from services.common.exchange.chunk_stream import ChunkStream
from services.common.exchange.digests import digest
from services.common.exchange.payload import BytesPayload, Payload
from services.common.exchange.shared_memory_reader import SharedMemoryError, is_near, read_shared
from services.common.exchange.tensor_store import TensorStore
from services.common.metrics import Metrics

IDLE_BUFFER_BYTES = 256 * 1024 * 1024
"""Most memory that a reader keeps for tensors to come."""
SHARED_READS = 4
"""Most at once: more would not be faster, and holders that are frozen leave threads for other work."""

_log = logging.getLogger("safelight.exchange")


class TensorReader:
    """Resolves references: inline, from this process's own store, through shared memory, or by the chunk stream.

    Args:
        store: this process's leases.
        channels: connections to other stages.
        max_tensor_bytes: a larger tensor is refused before any memory is taken for it.
        metrics: where the bytes moved go.
    """

    def __init__(self, store: TensorStore, channels: ChannelPool, max_tensor_bytes: int, metrics: Metrics) -> None:
        self._store = store
        self._max_tensor_bytes = max_tensor_bytes
        self._metrics = metrics
        self._buffers = BufferPool(IDLE_BUFFER_BYTES)
        self._shared_reads = asyncio.Semaphore(SHARED_READS)
        self._stream = ChunkStream(channels, metrics)

    async def read(self, ref: TensorRef, field: str) -> Payload:
        """The tensor of a reference, its digest checked; `field` names it in errors.

        Raises:
            TensorCorruptError: the bytes do not match the header, or the header is not one this stage accepts.
            LeaseExpiredError: the holder has dropped it.
            StageUnavailableError: the holder can't be reached.
            OutOfMemoryError: there is no room for it.
        """
        with _naming(field):
            size = byte_size(ref.header)
        if size > self._max_tensor_bytes:
            raise TensorCorruptError(
                f"{field}: {size} bytes are more than the {self._max_tensor_bytes} this stage accepts", field=field
            )
        location = ref.WhichOneof("location")
        if location is None:
            raise TensorCorruptError(f"{field}: the reference has neither bytes nor a lease", field=field)
        if location == "inline":
            return self._inline(ref, field)
        if ref.lease.exchange_id == self._store.exchange_id:
            payload = self._store.get(ref.lease.ticket)
            self._metrics.tensor_bytes.labels("local").inc(size)
            return payload
        return await self._fetch(ref, size, field)

    def _inline(self, ref: TensorRef, field: str) -> Payload:
        with _naming(field):
            check_size(ref.header, len(ref.inline))
        _check_digest(ref, digest(ref.inline), field)
        self._metrics.tensor_bytes.labels("inline").inc(len(ref.inline))
        return BytesPayload(ref.inline)

    async def _fetch(self, ref: TensorRef, size: int, field: str) -> Payload:
        """A tensor of another process, by the shortest way that works."""
        try:
            buffer = await self._buffer(size)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{field}: {size} bytes are more than this stage has room for now", field=field
            ) from error
        path = "shared" if await self._read_shared(ref, buffer) else "stream"
        if path == "stream":
            _check_digest(ref, await self._stream.pull(ref.lease, buffer, field), field)
        self._metrics.tensor_bytes.labels(path).inc(size)
        return BytesPayload(buffer)

    async def _buffer(self, size: int) -> memoryview:
        """A large buffer may have to be fetched from the system page by page: off the event loop."""
        if size <= CHUNK_BYTES:
            return self._buffers.take(size)
        return await asyncio.to_thread(self._buffers.take, size)

    async def _read_shared(self, ref: TensorRef, buffer: memoryview) -> bool:
        """Fill the buffer through shared memory; False when that is not possible."""
        if not is_near(ref.lease):
            return False
        try:
            async with self._shared_reads:
                received = await asyncio.to_thread(read_shared, ref.lease, buffer)
            if _matches(ref, received):
                return True
            reason = "the bytes do not match their digest"
        except SharedMemoryError as error:
            reason = str(error)
        _log.info("no tensor through shared memory: %s", reason, extra={"endpoint": ref.lease.endpoint})
        self._metrics.shared_memory_fallbacks.inc()
        return False


def _matches(ref: TensorRef, received: bytes) -> bool:
    """Whether this is the digest that the header has; one that has none matches all."""
    return ref.header.digest in (b"", received)


def _check_digest(ref: TensorRef, received: bytes, field: str) -> None:
    if not _matches(ref, received):
        raise TensorCorruptError(f"{field}: the bytes do not match their digest; pull it again", field=field)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Says in a header's errors which tensor of the request it belongs to."""
    try:
        yield
    except TensorCorruptError as error:
        raise TensorCorruptError(f"{field}: {error.message}", field=field) from error
