"""The producer's side: tensors under leases."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from safelight.errors import LeaseExpiredError
from safelight.tensors import MAX_INLINE_BYTES, check_size
from safelight.v1.tensor_pb2 import TensorHeader, TensorLease, TensorRef
from services.common.exchange.digests import digest
from services.common.exchange.payload import Payload
from services.common.metrics import Metrics
from services.common.settings import SettingsError

_WILDCARDS = ("0.0.0.0:", "[::]:")


@dataclass(frozen=True)
class _Leased:
    payload: Payload
    data: memoryview  # its bytes on the host: made once, however many consumers pull
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
        self._empty = asyncio.Event()
        self._empty.set()
        self._endpoint = ""
        self._host = ""

    def advertise(self, endpoint: str) -> None:
        """Say at which gRPC target this process serves its leases; known once the server is bound.

        Raises:
            SettingsError: consumers can't reach that target.
        """
        if endpoint.startswith(_WILDCARDS):
            raise SettingsError(f"advertise: is needed with listen {endpoint}; give the address that others reach")
        self._endpoint = endpoint

    def share_within(self, host: str) -> None:
        """Say that processes of that host can have the tensors through shared memory."""
        self._host = host

    async def put(self, header: TensorHeader, payload: Payload) -> TensorRef:
        """A reference to the tensor: inline when it is small, else a lease, which ends by itself in time.

        The header gets its digest here.
        """
        data, sealed = await asyncio.to_thread(_seal, header, payload)
        if data.nbytes <= MAX_INLINE_BYTES:
            return TensorRef(header=sealed, inline=bytes(data))
        return TensorRef(header=sealed, lease=self._lease(payload, data))

    def _lease(self, payload: Payload, data: memoryview) -> TensorLease:
        ticket = secrets.token_hex(16)
        expires = self._clock() + self._lease_seconds
        asyncio.get_running_loop().call_later(self._lease_seconds, self.release, (ticket,))
        self._leased[ticket] = _Leased(payload, data, expires)
        self._report()
        lease = TensorLease(endpoint=self._endpoint, exchange_id=self.exchange_id, ticket=ticket, host=self._host)
        lease.expires_at.FromNanoseconds(int(expires * 1e9))
        return lease

    def get(self, ticket: str) -> Payload:
        """The tensor of a ticket; the lease goes on.

        Raises:
            LeaseExpiredError: the ticket is unknown, released or expired.
        """
        return self._find(ticket).payload

    def get_bytes(self, ticket: str) -> memoryview:
        """The bytes of a ticket's tensor, valid while a view of them lives; the lease goes on.

        Raises:
            LeaseExpiredError: the ticket is unknown, released or expired.
        """
        return self._find(ticket).data

    def _find(self, ticket: str) -> _Leased:
        self.sweep()
        leased = self._leased.get(ticket)
        if leased is None:
            raise LeaseExpiredError(
                "the tensor's lease has been released or has expired: run the stage that made it again", ticket=ticket
            )
        return leased

    def release(self, tickets: Iterable[str]) -> None:
        """End leases; unknown tickets are ignored."""
        for ticket in tickets:
            self._leased.pop(ticket, None)
        self._report()

    def sweep(self) -> None:
        """Drop what has expired."""
        now = self._clock()
        self.release([ticket for ticket, leased in self._leased.items() if leased.expires <= now])

    async def until_empty(self) -> None:
        """Returns when no lease is left."""
        await self._empty.wait()

    def _report(self) -> None:
        (self._empty.clear if self._leased else self._empty.set)()
        self._metrics.leases.set(len(self._leased))
        self._metrics.leased_bytes.set(sum(leased.data.nbytes for leased in self._leased.values()))


def _seal(header: TensorHeader, payload: Payload) -> tuple[memoryview, TensorHeader]:
    """The payload's bytes, and the header with their digest. For a thread: the bytes may have to come from a GPU."""
    data = payload.buffer()
    check_size(header, data.nbytes)
    sealed = TensorHeader()
    sealed.CopyFrom(header)
    sealed.digest = digest(data)
    return data, sealed
