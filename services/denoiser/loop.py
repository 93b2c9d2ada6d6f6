"""The one denoising loop: asks the scheduler for a batch, runs its step on the device, tells every request.

Runs on the event loop; the step itself runs on the device's thread. A request that is cancelled, or whose deadline has
passed, leaves before the next step. When the replica drains, every request leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from safelight.errors import DeadlineExceededError, OutOfMemoryError, OverloadedError, StageDrainingError
from services.common.executor import DeviceExecutor
from services.common.metrics import Metrics
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob, StepDone
from services.denoiser.sampling.sampler import calls_left
from services.denoiser.scheduler import StepNeeds, StepScheduler
from services.modeling.memory import is_out_of_memory

_STAGE = "denoiser"


class DenoiseLoop:
    """Steps all requests in flight.

    Args:
        engine: computes steps.
        scheduler: forms batches; its clock is `time.monotonic()`.
        executor: the device's thread.
        metrics: where steps and queues are counted.
        on_idle: runs on the device's thread when no request is left.
    """

    def __init__(
        self,
        engine: DenoiserEngine,
        scheduler: StepScheduler[DenoiseJob],
        executor: DeviceExecutor,
        metrics: Metrics,
        on_idle: Callable[[], None],
    ) -> None:
        self.draining = False
        self._on_idle = on_idle
        self._engine = engine
        self._scheduler = scheduler
        self._executor = executor
        self._metrics = metrics
        self._jobs: set[DenoiseJob] = set()
        self._stepping: Sequence[DenoiseJob] = ()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start stepping; needs a running event loop."""
        self._task = asyncio.create_task(self._run(), name="denoise-loop")

    async def close(self) -> None:
        """Stop after the running step."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check_open(self) -> None:
        """Check that a further request may come in.

        Raises:
            StageDrainingError: the replica is stopping.
            OverloadedError: the queue is full.
        """
        if self.draining:
            raise _draining()
        if self._scheduler.is_full:
            raise OverloadedError(
                f"the denoiser's queue is full ({self._scheduler.waiting} waiting): retry later or add replicas",
                retry_after_seconds=max(self._scheduler.backlog_seconds() / max(len(self._jobs), 1), 0.05),
                stage=_STAGE,
                capacity=str(self._scheduler.waiting),
            )

    def submit(self, job: DenoiseJob) -> int:
        """Take a request in; returns how many were there before it. Its events go to `job.events`.

        Raises:
            StageDrainingError, OverloadedError: see `check_open`.
        """
        self.check_open()
        needs = StepNeeds(
            job,
            self._engine.batch_key(job),
            job.rows,
            calls_left(job.plan, job.state),
            tenant=job.tenant,
            priority=job.priority,
            deadline=job.deadline,
            alone=job.exact,
            resumed=job.resumed,
        )
        position = self._scheduler.add(needs, time.monotonic())
        self._jobs.add(job)
        self._changed()
        self._work.set()
        return position

    def forget(self, job: DenoiseJob) -> None:
        """Drop a request, finished or not; a step in progress ends, but no further one is computed for it."""
        self._scheduler.remove(job)
        self._jobs.discard(job)
        self._changed()

    def drain(self) -> None:
        """Hand every request back with StageDrainingError: those in the running step when it ends, the others now."""
        self.draining = True
        for job in self._jobs.difference(self._stepping):
            self._end(job, _draining())

    def hand_back(self, model: str, error: Exception) -> None:
        """End every request of a model that can't be computed now, but for those in the running step, which ends."""
        for job in [job for job in self._jobs.difference(self._stepping) if job.model == model]:
            self._end(job, error)

    async def _run(self) -> None:
        while True:
            self._expire()
            if batch := self._scheduler.next_batch(time.monotonic()):
                await self._step(batch)
                await self._spill()
            else:
                self._work.clear()
                await self._executor.run(self._on_idle)
                await self._work.wait()

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._jobs if job.expired(now)]:
            self._end(job, DeadlineExceededError("the request's deadline has passed; no further step was computed"))

    async def _step(self, batch: Sequence[DenoiseJob]) -> None:
        started = time.monotonic()
        for job in batch:
            job.started = job.started or started
        self._stepping = batch
        self._changed()
        try:
            seconds = await self._executor.run(lambda: self._timed_step(batch))
        except Exception as error:  # the worker loop: the batch's requests end with the error, the loop goes on
            known = _out_of_memory(len(batch)) if is_out_of_memory(error) else error
            for job in batch:
                self._end(job, known)
        else:
            self._report(batch, seconds)
        finally:
            self._stepping = ()

    def _timed_step(self, batch: Sequence[DenoiseJob]) -> float:
        """Seconds of the device alone, without the wait for its thread."""
        started = time.perf_counter()
        self._engine.step(batch)
        return time.perf_counter() - started

    def _report(self, batch: Sequence[DenoiseJob], seconds: float) -> None:
        self._scheduler.stepped(batch, seconds)
        self._metrics.batch_size.labels(_STAGE).observe(len(batch))
        self._metrics.denoise_step_seconds.labels(batch[0].model).observe(seconds)
        now = time.monotonic()
        for job in batch:
            job.compute_seconds += seconds
            useful = job in self._jobs and not job.expired(now)
            self._metrics.denoise_steps.labels(job.model, "useful" if useful else "wasted").inc()
            if useful:
                self._tell(job, seconds, len(batch))

    def _tell(self, job: DenoiseJob, seconds: float, batch_size: int) -> None:
        """Tell a request of its step, if that has ended; if it was the last one, or the replica drains, it leaves."""
        job.step_seconds += seconds
        if not job.state.calls:
            self._tell_of_step(job, batch_size)
        if job.done:
            self.forget(job)
        elif self.draining:
            self._end(job, _draining())

    @staticmethod
    def _tell_of_step(job: DenoiseJob, batch_size: int) -> None:
        seconds, job.step_seconds = job.step_seconds, 0.0
        due = not job.done and job.checkpoints is not None and job.checkpoints.due(job.state, seconds / batch_size)
        checkpoint = job.state if due else None
        job.events.put_nowait(StepDone(job.state.step_index, seconds, batch_size, checkpoint, job.denoised))

    async def _spill(self) -> None:
        if yielded := self._scheduler.to_spill():
            moved = await self._executor.run(lambda: self._engine.spill(yielded))
            self._metrics.spilled_requests.inc(moved)

    def _end(self, job: DenoiseJob, error: Exception) -> None:
        self.forget(job)
        job.events.put_nowait(error)

    def _changed(self) -> None:
        self._metrics.queue_depth.labels(_STAGE).set(self._scheduler.waiting)
        self._metrics.running.labels(_STAGE).set(self._scheduler.running)


def _draining() -> StageDrainingError:
    return StageDrainingError(
        "this denoiser is stopping and has handed the request back: go on at another one, from the last checkpoint "
        "if there is one",
        stage=_STAGE,
    )


def _out_of_memory(batch_size: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"a step of {batch_size} requests does not fit the device's memory: ask for a smaller size, or lower "
        "max_batch_rows",
        stage=_STAGE,
    )
