"""Laws of the loop, with an engine whose steps end when the test says so: what is computed, and what is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import torch

from safelight.errors import DeadlineExceededError, StageDrainingError
from services.common.executor import DeviceExecutor
from services.common.metrics import Metrics
from services.denoiser.cost_curve import StepCosts
from services.denoiser.job import BatchKey, DenoiseJob, StepDone
from services.denoiser.loop import DenoiseLoop
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import advance
from services.denoiser.sampling.state import SamplerState
from services.denoiser.scheduler import SchedulerLimits, StepScheduler
from tests.support.model_samplings import STABLE_DIFFUSION

SHAPE = (1, 4, 2, 2)


class GatedEngine:
    """Steps that begin at once and end when they are let go; `spilled` are the jobs that were moved to the host."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[list[DenoiseJob]] = asyncio.Queue()
        self.spilled: list[DenoiseJob] = []
        self._gate = threading.Semaphore(0)
        self._event_loop = asyncio.get_running_loop()

    def batch_key(self, job: DenoiseJob) -> BatchKey:
        return BatchKey(job.model, SHAPE[1:], 0, job.exact)

    def step(self, jobs: Sequence[DenoiseJob]) -> None:
        self._event_loop.call_soon_threadsafe(self.begun.put_nowait, list(jobs))
        self._gate.acquire()
        for job in jobs:
            job.state = advance(job.plan, job.state, torch.zeros(SHAPE), job.noise)

    def spill(self, jobs: Sequence[DenoiseJob]) -> int:
        self.spilled.extend(jobs)
        return len(jobs)

    def let_go(self, steps: int = 1) -> None:
        self._gate.release(steps)


class Running:
    """A loop with a gated engine."""

    def __init__(self, max_running: int) -> None:
        self.engine, self.metrics, self.executor = GatedEngine(), Metrics(), DeviceExecutor("test")
        scheduler = StepScheduler[DenoiseJob](SchedulerLimits(max_running, 8, 8), StepCosts())
        self.left = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.loop = DenoiseLoop(
            self.engine,  # type: ignore[arg-type]
            scheduler,
            self.executor,
            self.metrics,
            lambda: self._leave(loop),
        )

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self.left.set)

    def steps(self, outcome: str) -> float:
        name, labels = "safelight_denoise_steps_total", {"model": "m", "outcome": outcome}
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running_loop(max_running: int = 4) -> AsyncIterator[Running]:
    running = Running(max_running)
    running.loop.start()
    try:
        yield running
    finally:
        running.engine.let_go(1000)
        await running.loop.close()
        running.executor.close()


def job(steps: int = 5, *, deadline: float | None = None, exact: bool = False, sampler: str = "euler") -> DenoiseJob:
    plan = plan_sampling(STABLE_DIFFUSION, latent_shape=SHAPE[1:], steps=steps, sampler=sampler)
    state = SamplerState(torch.zeros(SHAPE), 0, (), 1)
    return DenoiseJob("m", plan, NoiseSource(0, SHAPE), state, 1.0, None, None, deadline=deadline, exact=exact)


async def told(one: DenoiseJob) -> StepDone | Exception:
    return await asyncio.wait_for(one.events.get(), 30)


async def test_the_step_that_runs_when_its_request_is_cancelled_is_the_last_and_is_wasted() -> None:
    async with running_loop() as running:
        cancelled, other = job(), job(steps=1)
        running.loop.submit(cancelled)
        await running.engine.begun.get()
        running.loop.forget(cancelled)
        running.loop.submit(other)
        running.engine.let_go()
        assert await running.engine.begun.get() == [other]
        running.engine.let_go()
        assert isinstance(await told(other), StepDone)
        assert (running.steps("wasted"), running.steps("useful")) == (1, 1)
        assert cancelled.events.empty()


async def test_the_step_that_runs_when_its_request_expires_is_the_last_and_is_wasted() -> None:
    async with running_loop() as running:
        expiring = job(deadline=time.monotonic() + 60)
        running.loop.submit(expiring)
        await running.engine.begun.get()
        expiring.deadline = time.monotonic()
        running.engine.let_go()
        assert type(await told(expiring)) is DeadlineExceededError
        assert (running.steps("wasted"), running.steps("useful")) == (1, 0)
        assert running.engine.begun.empty()


async def test_a_request_that_has_expired_when_it_comes_gets_no_step() -> None:
    async with running_loop() as running:
        late = job(deadline=time.monotonic() - 1)
        running.loop.submit(late)
        assert type(await told(late)) is DeadlineExceededError
        assert running.engine.begun.empty()


async def test_draining_ends_waiting_requests_at_once_and_stepping_ones_with_their_step() -> None:
    async with running_loop() as running:
        stepping, waiting = job(exact=True), job(exact=True)
        running.loop.submit(stepping)
        running.loop.submit(waiting)
        assert await running.engine.begun.get() == [stepping]
        running.loop.drain()
        assert type(await told(waiting)) is StageDrainingError
        assert stepping.events.empty()
        running.engine.let_go()
        assert isinstance(await told(stepping), StepDone)
        assert type(await told(stepping)) is StageDrainingError
        assert (stepping.steps_run, waiting.steps_run) == (1, 0)


async def test_a_request_that_does_its_last_step_while_the_loop_drains_is_done() -> None:
    async with running_loop() as running:
        last = job(steps=1)
        running.loop.submit(last)
        await running.engine.begun.get()
        running.loop.drain()
        running.engine.let_go()
        assert isinstance(await told(last), StepDone)
        assert last.events.empty()


async def test_the_latents_of_a_request_that_yields_leave_the_device_when_there_is_no_room_for_them() -> None:
    async with running_loop(max_running=1) as running:
        long = job(steps=50)
        running.loop.submit(long)
        await running.engine.begun.get()
        urgent = job(steps=2, deadline=time.monotonic() + 60)
        urgent.exact = True  # shares no pass, so the other has to yield
        running.loop.submit(urgent)
        running.engine.let_go(4)
        for _ in range(2):
            assert isinstance(await told(urgent), StepDone)
        assert running.engine.spilled == [long]
        assert running.metrics.registry.get_sample_value("safelight_spilled_requests_total") == 1


async def test_the_device_is_given_back_when_no_request_is_left() -> None:
    async with running_loop() as running:
        only = job(steps=2)
        running.loop.submit(only)
        await running.engine.begun.get()
        running.left.clear()
        running.engine.let_go(2)
        assert isinstance(await told(only), StepDone)
        assert not running.left.is_set()  # not between its steps
        assert isinstance(await told(only), StepDone)
        await asyncio.wait_for(running.left.wait(), 30)


async def test_a_step_of_two_calls_is_told_once_with_the_time_of_both() -> None:
    async with running_loop() as running:
        one = job(steps=2, sampler="heun")
        running.loop.submit(one)
        running.engine.let_go(3)
        first, second = await told(one), await told(one)
        assert isinstance(first, StepDone)
        assert isinstance(second, StepDone)
        assert (first.step, second.step, one.events.empty()) == (1, 2, True)
        assert first.seconds + second.seconds == pytest.approx(one.compute_seconds)
        assert running.engine.begun.qsize() == running.steps("useful") == 3


async def test_a_request_leaves_a_draining_loop_between_the_calls_of_a_step() -> None:
    async with running_loop() as running:
        one = job(sampler="heun")
        running.loop.submit(one)
        await running.engine.begun.get()
        running.loop.drain()
        running.engine.let_go()
        assert isinstance(await told(one), StageDrainingError)
        assert (one.state.step_index, one.state.calls) == (0, 1)
