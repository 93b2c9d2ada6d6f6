"""Telling the stages that tensors of theirs are done with."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from safelight.v1.tensor_exchange_service_pb2 import ReleaseRequest
from safelight.v1.tensor_exchange_service_pb2_grpc import TensorExchangeServiceStub
from safelight.v1.tensor_pb2 import TensorRef
from services.common.channels import ChannelPool

_RELEASE_SECONDS = 5.0


@dataclass
class Leases:
    """Ends leases in the background, so that nothing waits for it. A holder that can't be told lets them expire."""

    channels: ChannelPool
    _releases: set[asyncio.Task[None]] = field(default_factory=set)

    def release(self, refs: Iterable[TensorRef]) -> None:
        """Tell every holder of these tensors; those that ride inline have none."""
        tickets: defaultdict[str, list[str]] = defaultdict(list)
        for ref in refs:
            if ref.HasField("lease"):
                tickets[ref.lease.endpoint].append(ref.lease.ticket)
        for endpoint, of_holder in tickets.items():
            task = asyncio.create_task(self._tell(endpoint, of_holder))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def settle(self) -> None:
        """Returns when every holder has been told, or given up."""
        await asyncio.gather(*self._releases)

    async def _tell(self, endpoint: str, tickets: list[str]) -> None:
        stub = TensorExchangeServiceStub(self.channels.get(endpoint))
        await asyncio.gather(
            stub.Release(ReleaseRequest(tickets=tickets), timeout=_RELEASE_SECONDS), return_exceptions=True
        )
