"""Tensor hand-off by reference (design, section 3): a producer's leases, a consumer's pulls.

A tensor up to 64 KiB rides inline. A larger one stays with its producer under a lease; the consumer takes it without a
copy when both live in one process, and pulls it in chunks of 1 MiB otherwise. Leases end by acknowledgement or by time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
import xxhash

from safelight.errors import (
    InvalidRequestError,
    LeaseExpiredError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
    from_rpc_error,
)
from safelight.tensors import MAX_INLINE_BYTES, byte_size, check_size
from safelight.v1 import tensor_exchange_service_pb2 as pb
from safelight.v1 import tensor_exchange_service_pb2_grpc as pb_grpc
from safelight.v1.tensor_pb2 import TensorHeader, TensorLease, TensorRef
from services.common.channels import ChannelPool
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.settings import SettingsError

CHUNK_BYTES = 1024 * 1024
_WILDCARDS = ("0.0.0.0:", "[::]:")


class Payload(Protocol):
    """A tensor in whatever form its producer computes with; a consumer in the same process takes it as it is."""

    def buffer(self) -> memoryview:
        """Its bytes, C order, little-endian, as a flat view that stays valid while the payload lives."""
        ...


@dataclass(frozen=True)
class BytesPayload:
    """A tensor that came over the wire."""

    data: bytes | bytearray

    def buffer(self) -> memoryview:
        return memoryview(self.data)


@dataclass(frozen=True)
class _Leased:
    header: TensorHeader
    payload: Payload
    size: int
    expires: float


class TensorStore:
    """The tensors a process holds for consumers, each until released or expired. Confined to the event loop.

    Args:
        lease_seconds: how long a consumer has to fetch a tensor.
        metrics: where the number and bytes of leases go.
        clock: seconds since the epoch.
    """

    def __init__(self, lease_seconds: float, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.exchange_id = uuid.uuid4().hex
        self._lease_seconds = lease_seconds
        self._metrics = metrics
        self._clock = clock
        self._leased: dict[str, _Leased] = {}
        self._endpoint = ""

    def advertise(self, endpoint: str) -> None:
        """Say at which gRPC target this process serves its leases; known once the server is bound.

        Raises:
            SettingsError: consumers can't reach that target.
        """
        if endpoint.startswith(_WILDCARDS):
            raise SettingsError(f"advertise: is needed with listen {endpoint}; give the address that others reach")
        self._endpoint = endpoint

    def put(self, header: TensorHeader, payload: Payload) -> TensorRef:
        """A reference to the tensor: inline when it is small, else a lease, which ends by itself in time.

        The header gets its digest here. Needs a running event loop.
        """
        data = payload.buffer()
        check_size(header, data.nbytes)
        sealed = TensorHeader()
        sealed.CopyFrom(header)
        sealed.digest = digest(data)
        if data.nbytes <= MAX_INLINE_BYTES:
            return TensorRef(header=sealed, inline=bytes(data))
        ticket = secrets.token_hex(16)
        expires = self._clock() + self._lease_seconds
        asyncio.get_running_loop().call_later(self._lease_seconds, self.release, (ticket,))
        self._leased[ticket] = _Leased(sealed, payload, data.nbytes, expires)
        self._report()
        lease = TensorLease(endpoint=self._endpoint, exchange_id=self.exchange_id, ticket=ticket)
        lease.expires_at.FromNanoseconds(int(expires * 1e9))
        return TensorRef(header=sealed, lease=lease)

    def get(self, ticket: str) -> Payload:
        """The tensor of a ticket; the lease goes on.

        Raises:
            LeaseExpiredError: the ticket is unknown, released or expired.
        """
        self.sweep()
        leased = self._leased.get(ticket)
        if leased is None:
            raise LeaseExpiredError(
                "the tensor's lease has been released or has expired: run the stage that made it again", ticket=ticket
            )
        return leased.payload

    def release(self, tickets: Iterable[str]) -> None:
        """End leases; unknown tickets are ignored."""
        for ticket in tickets:
            self._leased.pop(ticket, None)
        self._report()

    def sweep(self) -> None:
        """Drop what has expired."""
        now = self._clock()
        self.release([ticket for ticket, leased in self._leased.items() if leased.expires <= now])

    def _report(self) -> None:
        self._metrics.leases.set(len(self._leased))
        self._metrics.leased_bytes.set(sum(leased.size for leased in self._leased.values()))


class TensorExchangeServicer(pb_grpc.TensorExchangeServiceServicer):
    """Serves a store's tensors to consumers in other processes."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[pb.PullResponse]:
        data = self._store.get(request.ticket).buffer()
        if not 0 <= request.offset <= data.nbytes:
            raise InvalidRequestError.of("offset", f"is {request.offset}; must be from 0 to {data.nbytes}")
        for start in range(request.offset, data.nbytes, CHUNK_BYTES):
            yield pb.PullResponse(data=bytes(data[start : start + CHUNK_BYTES]))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._store.release(request.tickets)
        return pb.ReleaseResponse()


class TensorReader:
    """Resolves references: inline, from this process's own store, or by pulling from the stage that holds them.

    Args:
        store: this process's leases.
        channels: connections to other stages.
        max_tensor_bytes: a larger tensor is refused before any memory is taken for it.
        metrics: where the bytes moved go.
    """

    def __init__(self, store: TensorStore, channels: ChannelPool, max_tensor_bytes: int, metrics: Metrics) -> None:
        self._store = store
        self._channels = channels
        self._max_tensor_bytes = max_tensor_bytes
        self._metrics = metrics

    async def read(self, ref: TensorRef, field: str) -> Payload:
        """The tensor of a reference, its digest checked; `field` names it in errors.

        Raises:
            TensorCorruptError: the bytes do not match the header, or the header is not one this stage accepts.
            LeaseExpiredError: the holder has dropped it.
            StageUnavailableError: the holder can't be reached.
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
            return self._received(ref, BytesPayload(ref.inline), "inline", field)
        if ref.lease.exchange_id == self._store.exchange_id:
            payload = self._store.get(ref.lease.ticket)
            self._metrics.tensor_bytes.labels("local").inc(size)
            return payload
        return self._received(ref, await self._pull(ref.lease, size, field), "stream", field)

    async def release(self, refs: Sequence[TensorRef]) -> None:
        """Tell the holders that these tensors are done with; a holder that is gone has nothing left to release."""
        leases = [ref.lease for ref in refs if ref.WhichOneof("location") == "lease"]
        self._store.release(lease.ticket for lease in leases if lease.exchange_id == self._store.exchange_id)
        remote = [lease for lease in leases if lease.exchange_id != self._store.exchange_id]
        calls = [self._stub(lease).Release(pb.ReleaseRequest(tickets=[lease.ticket]), timeout=5) for lease in remote]
        await asyncio.gather(*calls, return_exceptions=True)

    async def _pull(self, lease: TensorLease, size: int, field: str) -> BytesPayload:
        data = bytearray(size)
        filled = 0
        try:
            call = self._stub(lease).Pull(pb.PullRequest(ticket=lease.ticket))
            async for chunk in call:
                end = filled + len(chunk.data)
                if end > size:
                    call.cancel()
                    raise TensorCorruptError(f"{field}: more bytes arrived than the {size} of its header", field=field)
                data[filled:end] = chunk.data
                filled = end
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, lease, field) from error
        if filled < size:
            raise TensorCorruptError(f"{field}: {filled} of {size} bytes arrived; pull it again", field=field)
        return BytesPayload(data)

    @staticmethod
    def _explain(error: grpc.aio.AioRpcError, lease: TensorLease, field: str) -> SafelightError:
        known = from_rpc_error(error)
        if not isinstance(known, StageUnavailableError):
            return known
        return StageUnavailableError(
            f"{field}: its holder at {lease.endpoint} can't be reached: run that stage again", endpoint=lease.endpoint
        )

    def _received(self, ref: TensorRef, payload: Payload, path: str, field: str) -> Payload:
        data = payload.buffer()
        with _naming(field):
            check_size(ref.header, data.nbytes)
        if ref.header.digest and ref.header.digest != digest(data):
            raise TensorCorruptError(f"{field}: the bytes do not match their digest; pull it again", field=field)
        self._metrics.tensor_bytes.labels(path).inc(data.nbytes)
        return payload

    def _stub(self, lease: TensorLease) -> pb_grpc.TensorExchangeServiceStub:
        return pb_grpc.TensorExchangeServiceStub(self._channels.get(lease.endpoint))


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Says in a header's errors which tensor of the request it belongs to."""
    try:
        yield
    except TensorCorruptError as error:
        raise TensorCorruptError(f"{field}: {error.message}", field=field) from error


def digest(data: memoryview | bytes) -> bytes:
    """XXH3-64 of the bytes, big-endian."""
    return xxhash.xxh3_64_digest(data)
