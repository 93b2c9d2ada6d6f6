"""The leases that a request leaves behind at the stages, acknowledged when it has ended."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from safelight.v1.tensor_exchange_service_pb2 import ReleaseRequest
from safelight.v1.tensor_exchange_service_pb2_grpc import TensorExchangeServiceStub
from safelight.v1.tensor_pb2 import Conditioning, TensorRef
from services.common.channels import ChannelPool

_RELEASE_SECONDS = 5.0


@dataclass
class Leases:
    """Collects the references of one request. A holder that can't be told lets its leases expire."""

    channels: ChannelPool
    _tickets: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, ref: TensorRef) -> None:
        """Remember a reference, if it is a lease."""
        if ref.HasField("lease"):
            self._tickets[ref.lease.endpoint].append(ref.lease.ticket)

    def note_conditioning(self, conditioning: Conditioning) -> None:
        """Remember every tensor of a prompt's conditioning."""
        for named in conditioning.tensors:
            self.note(named.tensor)

    async def release(self) -> None:
        """Tell every holder, all at once."""
        calls = [
            TensorExchangeServiceStub(self.channels.get(endpoint)).Release(
                ReleaseRequest(tickets=tickets), timeout=_RELEASE_SECONDS
            )
            for endpoint, tickets in self._tickets.items()
        ]
        self._tickets.clear()
        await asyncio.gather(*calls, return_exceptions=True)
