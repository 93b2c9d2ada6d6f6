"""The denoising of one picture, on as many replicas as it takes.

When a denoiser dies, stops or falls silent, the next one goes on from the newest checkpoint, or from noise if there is
none, or none that it accepts.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from gateway.checkpoints import Checkpoints, is_refused
from gateway.input_encoding import EncodedInputs
from gateway.ledger import Ledger
from gateway.plan import GenerationPlan
from gateway.report import Report
from gateway.retry import Attempts
from gateway.settings import GatewaySettings
from gateway.stage_calls import Loss, StageCallError, StageCalls
from safelight.errors import InternalError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.work_pb2 import Checkpoint, CheckpointOptions, StageTiming
from services.common.metrics import Metrics

_STAGE = "denoiser"
_DYING_SECONDS = 0.2  # what a dead process had sent is on its way for no longer


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

    async def run(self, inputs: EncodedInputs) -> DenoiseResult:
        """The latent of the picture.

        Raises:
            InputsLostError: the conditioning, or another encoded input, is gone.
            SafelightError: a denoiser refused the request, or none could do it.
        """
        attempts = Attempts(_STAGE, self.settings.max_attempts, self.metrics)
        while True:
            start = await self.checkpoints.newest()
            try:
                return await self._follow(self._request(inputs, start), attempts)
            except StageCallError as failure:
                if start is not None and is_refused(start, failure.error):
                    self.checkpoints.drop()
                else:
                    await self._recover(failure, attempts)

    def _request(self, inputs: EncodedInputs, start: Checkpoint | None) -> DenoiseRequest:
        parameters, image = self.plan.images[self.index], inputs.image
        return DenoiseRequest(
            context=self.plan.context,
            model=parameters.model,
            conditioning=inputs.prompts.positive.conditioning,
            negative_conditioning=inputs.prompts.negative.conditioning,
            latent_shape=self.plan.latent_shape,
            sampling=parameters.sampling,
            guidance=parameters.guidance,
            seed=parameters.seed,
            initial_latents=image.latents,
            strength=parameters.strength if image.latents else None,
            mask=image.mask,
            adapters=parameters.adapters,
            determinism=self.plan.determinism,
            preview=self.plan.preview,
            checkpoints=CheckpointOptions(every_steps=self.settings.checkpoint_steps),
            resume_from=start,
            size_conditioning=parameters.size_conditioning if parameters.HasField("size_conditioning") else None,
            keyframe_latents=inputs.keyframes.latents,
            keyframe_indices=inputs.keyframes.indices,
        )

    async def _follow(self, request: DenoiseRequest, attempts: Attempts) -> DenoiseResult:
        """One replica's events up to its result; what it spent is put into the ledger, however it ends."""
        spent = StageTiming(stage=_STAGE)
        try:
            async with aclosing(self.calls.denoise(request, self.plan.calls_per_step, attempts.failed)) as events:
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
            self.checkpoints.announce(event.checkpoint)

    async def _recover(self, failure: StageCallError, attempts: Attempts) -> None:
        """Returns when the next replica may be tried; raises what `Attempts.recover` does."""
        if failure.loss is not None:
            await self.checkpoints.settle(self._fetch_seconds(failure.loss))
        patience = self.settings.replica_wait_seconds if self.ledger.steps_reached else 0.0
        await attempts.recover(failure, patience)
        if failure.loss is not None:
            self.metrics.resumes.labels(failure.loss).inc()

    def _fetch_seconds(self, loss: Loss) -> float:
        """How long a lost replica's last checkpoint is waited for: one that is still there hands it out."""
        handed_out = self.settings.replica_wait_seconds
        return {"drain": handed_out, "restart": handed_out, "death": _DYING_SECONDS, "silence": 0.0}[loss]
