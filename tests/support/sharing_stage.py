"""What one process of a stage has to exchange tensors: leases, shared memory, and a reader of others' references."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorRef
from services.common.exchange import BytesPayload, SharedMemoryServer, TensorReader, TensorStore
from services.common.metrics import Metrics


@dataclass(frozen=True)
class SharingStage:
    """A process that serves its leases by gRPC and through shared memory."""

    store: TensorStore
    shared_memory: SharedMemoryServer
    reader: TensorReader
    metrics: Metrics

    def received(self, path: str) -> float:
        return self.metrics.registry.get_sample_value("safelight_tensor_bytes_total", {"path": path}) or 0

    @property
    def fallbacks(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_shared_memory_fallbacks_total")

    async def put(self, size: int) -> tuple[bytes, TensorRef]:
        data = random.Random(size).randbytes(size)
        return data, await self.store.put(TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size]), BytesPayload(data))


StartSharingStage = Callable[..., Awaitable[SharingStage]]
"""The `start_sharing` fixture: starts one, with 4 MiB of shared memory or as many bytes as it is given."""


def open_descriptors() -> int:
    """File descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
