"""The denoising of one picture, on as many replicas as it takes.

When a denoiser dies, stops or falls silent, the next one goes on from the newest checkpoint, or from noise if there is
none, or none that it accepts.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

from gateway.checkpoints import Checkpoints, is_refused
from gateway.ledger import Ledger
from gateway.plan import GenerationPlan
from gateway.prompt_encoding import Encoded
from gateway.report import Report
from gateway.retry import Attempts
from gateway.settings import GatewaySettings
from gateway.stage_calls import StageCallError, StageCalls
from safelight.errors import InternalError, OverloadedError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.work_pb2 import Checkpoint, CheckpointOptions, StageTiming
from services.common.metrics import Metrics

_STAGE = "denoiser"
_LONGEST_PAUSE_SECONDS = 1.0


@dataclass
class Denoising:
    """Gets the latent of one picture.

    Args:
        plan: the request.
        index: which picture.
        calls: the stages.
        checkpoints: the picture's; they outlast a failure.
        ledger: takes what it costs.
        report: takes what the client is told.
        settings: how often to try, and how long to wait.
        metrics: where resumptions are counted.
    """

    plan: GenerationPlan
    index: int
    calls: StageCalls
    checkpoints: Checkpoints
    ledger: Ledger
    report: Report
    settings: GatewaySettings
    metrics: Metrics
    _full_since: float | None = None

    async def run(self, encoded: Encoded) -> DenoiseResult:
        """The latent of the picture.

        Raises:
            InputsLostError: the conditioning is gone.
            SafelightError: a denoiser refused the request, or none could do it.
        """
        attempts = Attempts(_STAGE, self.settings.max_attempts, self.metrics)
        while True:
            start = await self.checkpoints.newest()
            try:
                return await self._follow(self._request(encoded, start), attempts)
            except StageCallError as failure:
                if start is not None and is_refused(start, failure.error):
                    self.checkpoints.drop()
                else:
                    await self._recover(failure, attempts)

    def _request(self, encoded: Encoded, start: Checkpoint | None) -> DenoiseRequest:
        parameters = self.plan.images[self.index]
        return DenoiseRequest(
            context=self.plan.context,
            model=parameters.model,
            conditioning=encoded.positive.conditioning,
            negative_conditioning=encoded.negative.conditioning,
            latent_shape=self.plan.latent_shape,
            sampling=parameters.sampling,
            guidance=parameters.guidance,
            seed=parameters.seed,
            determinism=self.plan.determinism,
            preview=self.plan.preview,
            checkpoints=CheckpointOptions(every_steps=self.settings.checkpoint_steps),
            resume_from=start,
        )

    async def _follow(self, request: DenoiseRequest, attempts: Attempts) -> DenoiseResult:
        """One replica's events up to its result; what it spent is put into the ledger, however it ends."""
        spent = StageTiming(stage=_STAGE)
        try:
            async with aclosing(self.calls.denoise(request, attempts.failed)) as events:
                async for event in events:
                    if event.HasField("result"):
                        self.ledger.timings.append(event.result.timing)
                        return event.result
                    self._note(event, spent, attempts)
        except StageCallError as failure:
            if spent.steps:
                spent.replica = failure.replica.address
                self.ledger.timings.append(spent)
            raise
        raise InternalError("a denoiser ended its stream without a result")

    def _note(self, event: DenoiseResponse, spent: StageTiming, attempts: Attempts) -> None:
        if event.HasField("progress"):
            spent.steps += 1
            spent.compute_seconds += event.progress.step_seconds
            if self.ledger.note_step(event.progress.step):
                attempts.note_progress()
            self.report.progress(_STAGE, event.progress.step, event.progress.steps)
        elif event.HasField("queued"):
            self.report.queued(_STAGE, event.queued.position)
        elif event.HasField("preview"):
            self.report.preview(event.preview)
        elif event.HasField("checkpoint"):
            self._announce(event.checkpoint)

    def _announce(self, checkpoint: Checkpoint) -> None:
        if not 0 < checkpoint.step < self.plan.images[self.index].sampling.steps:
            return
        self.checkpoints.announce(checkpoint)

    async def _recover(self, failure: StageCallError, attempts: Attempts) -> None:
        """Returns when the next replica may be tried; raises what `Attempts.note` does."""
        # A replica that drains still hands its last checkpoint out; one that has died has cut the connection.
        await self.checkpoints.settle(self.settings.silence_seconds if failure.loss != "silence" else 0.0)
        if isinstance(failure.error, OverloadedError) and self.ledger.steps_reached and self._may_wait():
            await asyncio.sleep(min(failure.error.retry_after_seconds or 0.0, _LONGEST_PAUSE_SECONDS))
            return
        self._full_since = None
        attempts.note(failure)
        if failure.loss is not None:
            self.metrics.resumes.labels(failure.loss).inc()

    def _may_wait(self) -> bool:
        """Whether a picture that has lost its place waits on for another one, as it would for a replica."""
        self._full_since = self._full_since or time.monotonic()
        return time.monotonic() - self._full_since < self.settings.replica_wait_seconds
