"""The one denoising loop: asks the scheduler for a batch, runs its step on the device, tells every request.

Runs on the event loop; the step itself runs on the device's thread. A request that is cancelled, or whose deadline has
passed, leaves before the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sequence

from safelight.errors import DeadlineExceededError, OutOfMemoryError, OverloadedError
from services.common.executor import DeviceExecutor
from services.common.metrics import Metrics
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob, StepDone
from services.denoiser.scheduler import StepNeeds, StepScheduler
from services.modeling.memory import is_out_of_memory

_STAGE = "denoiser"


class DenoiseLoop:
    """Steps all requests in flight.

    Args:
        engine: computes steps.
        scheduler: forms batches.
        executor: the device's thread.
        metrics: where steps and queues are counted.
    """

    def __init__(
        self, engine: DenoiserEngine, scheduler: StepScheduler[DenoiseJob], executor: DeviceExecutor, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._executor = executor
        self._metrics = metrics
        self._jobs: set[DenoiseJob] = set()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._step_seconds = 0.05

    def start(self) -> None:
        """Start stepping; needs a running event loop."""
        self._task = asyncio.create_task(self._run(), name="denoise-loop")

    async def close(self) -> None:
        """Stop after the running step."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check_capacity(self) -> None:
        """Raises OverloadedError when no further request may wait."""
        if self._scheduler.is_full:
            backlog = sum(job.steps - job.state.step_index for job in self._jobs)
            raise OverloadedError(
                f"the denoiser's queue is full ({self._scheduler.waiting} waiting): retry later or add replicas",
                retry_after_seconds=max(self._step_seconds * backlog / len(self._jobs), 0.05),
                stage=_STAGE,
                capacity=str(self._scheduler.waiting),
            )

    def submit(self, job: DenoiseJob, batch_key: Hashable) -> int:
        """Take a request in; returns how many were there before it. Its events go to `job.events`.

        Raises:
            OverloadedError: the queue is full.
        """
        self.check_capacity()
        position = self._scheduler.add(StepNeeds(job, batch_key, job.rows))
        self._jobs.add(job)
        self._changed()
        self._work.set()
        return position

    def forget(self, job: DenoiseJob) -> None:
        """Drop a request, finished or not; a step in progress ends, but no further one is computed for it."""
        self._scheduler.remove(job)
        self._jobs.discard(job)
        self._changed()

    async def _run(self) -> None:
        while True:
            self._expire()
            if batch := self._scheduler.next_batch():
                await self._step(batch)
            else:
                self._work.clear()
                await self._work.wait()

    def _expire(self) -> None:
        now = time.time()
        for job in [job for job in self._jobs if job.deadline is not None and job.deadline <= now]:
            self._end(job, DeadlineExceededError("the request's deadline has passed; no further step was computed"))

    async def _step(self, batch: Sequence[DenoiseJob]) -> None:
        started = time.monotonic()
        for job in batch:
            job.started = job.started or started
        try:
            await self._executor.run(lambda: self._engine.step(batch))
        except Exception as error:  # the worker loop: the batch's requests end with the error, the loop goes on
            known = _out_of_memory(len(batch)) if is_out_of_memory(error) else error
            for job in batch:
                self._end(job, known)
        else:
            self._report(batch, time.monotonic() - started)

    def _report(self, batch: Sequence[DenoiseJob], seconds: float) -> None:
        self._step_seconds = seconds
        self._metrics.batch_size.labels(_STAGE).observe(len(batch))
        self._metrics.denoise_step_seconds.labels(batch[0].model).observe(seconds)
        self._metrics.denoise_steps.labels(batch[0].model).inc(len(batch))
        for job in batch:
            job.compute_seconds += seconds
            job.events.put_nowait(StepDone(job.state.step_index, job.steps, seconds, len(batch)))
            if job.state.step_index == job.steps:
                self.forget(job)

    def _end(self, job: DenoiseJob, error: Exception) -> None:
        self.forget(job)
        job.events.put_nowait(error)

    def _changed(self) -> None:
        self._metrics.queue_depth.labels(_STAGE).set(self._scheduler.waiting)
        self._metrics.running.labels(_STAGE).set(self._scheduler.running)


def _out_of_memory(batch_size: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"a step of {batch_size} requests does not fit the device's memory: ask for a smaller size, or lower "
        "max_batch_rows",
        stage=_STAGE,
    )
