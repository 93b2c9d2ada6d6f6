"""What runs on the decoder's device: computations of all requests, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from safelight.errors import OutOfMemoryError
from safelight.v1.work_pb2 import StageTiming
from services.common.batch_costs import WorkKind
from services.common.batching import Batcher
from services.common.executor import DeviceExecutor
from services.common.metrics import Metrics
from services.modeling.memory import is_out_of_memory

Computation = Callable[[], Tensor]
DeviceQueue = Batcher[Computation, Tensor]


@dataclass(frozen=True)
class DeviceWork:
    """Queues computations.

    Args:
        queue: that of the device; full, it refuses.
        metrics: where they are counted.
    """

    queue: DeviceQueue
    metrics: Metrics

    async def compute(
        self, kind: WorkKind, computation: Computation, *, admitted: bool = False
    ) -> tuple[Tensor, StageTiming]:
        """Run on the device, after those that came before; the next piece of what is `admitted` whatever waits.

        Raises:
            OverloadedError: too many wait.
            OutOfMemoryError: it does not fit the device.
        """
        tensor, queued, computed = await self.queue.submit(computation, kind, admitted=admitted)
        self.metrics.queue_seconds.labels("decoder").observe(queued)
        self.metrics.stage_seconds.labels("decoder", kind.model).observe(computed)
        return tensor, StageTiming(stage="decoder", queue_seconds=queued, compute_seconds=computed)


async def compute_on(executor: DeviceExecutor, computation: Computation) -> Tensor:
    """The computation's result, from the device's thread.

    Raises:
        OutOfMemoryError: it does not fit the device.
    """
    try:
        return await executor.run(computation)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "the picture does not fit the device's memory: ask for a smaller size, or lower untiled_area",
            stage="decoder",
        ) from error
