"""The denoiser's load: what its scheduler holds, and what steps have cost."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from safelight.v1.load_service_pb2 import GetLoadResponse, WorkCost
from services.denoiser.cost_curve import CostPoint, StepCosts
from services.denoiser.job import BatchKey, DenoiseJob
from services.denoiser.scheduler import StepScheduler


def report_load(
    scheduler: StepScheduler[DenoiseJob], costs: StepCosts, capacity: int, draining: bool
) -> GetLoadResponse:
    """How busy the denoiser is at the moment.

    Args:
        scheduler: holds the requests.
        costs: what steps have cost so far.
        capacity: requests that it takes at most, running and waiting.
        draining: whether it is stopping and takes nothing new.
    """
    return GetLoadResponse(
        running=scheduler.running,
        waiting=scheduler.waiting,
        capacity=capacity,
        backlog_seconds=scheduler.backlog_seconds(),
        costs=_work_costs(costs.points()),
        draining=draining,
    )


def _work_costs(points: Iterable[CostPoint]) -> list[WorkCost]:
    """The points by model, latent shape and rows; where prompts of several lengths were measured, their median.

    Those of the exact class are left out: its rows run one by one, so that its steps cost what single rows do.
    """
    seconds: defaultdict[tuple[str, tuple[int, ...], int], list[float]] = defaultdict(list)
    for point in points:
        key = point.batch_key
        assert isinstance(key, BatchKey)
        if not key.exact:
            seconds[key.model, key.latent_shape, point.rows].append(point.seconds)
    return [
        WorkCost(model=model, latent_shape=shape, rows=rows, seconds=statistics.median(measured))
        for (model, shape, rows), measured in seconds.items()
    ]
