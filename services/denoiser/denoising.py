"""The life of one denoise request: check, prepare, queue, steps with checkpoints and previews, hand the latent off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from safelight.errors import ModelRestartingError, StageDrainingError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, DETERMINISM_CLASS_ROUNDING, StageTiming
from services.common.exchange import TensorStore
from services.common.metrics import Metrics
from services.common.model_servicer import find_model
from services.denoiser.checkpoints import CheckpointWriter
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob, StepDone
from services.denoiser.loop import DenoiseLoop
from services.denoiser.preparation import Preparation, work_deadline
from services.denoiser.previews import MEDIA_TYPE
from services.denoiser.sampling.state import SamplerState
from services.denoiser.validation import check_denoise
from services.modeling.wire import TorchPayload, check_finite, make_header

_LAYOUTS = {4: "BCHW", 5: "BCTHW"}
_CHECKPOINTS_HELD = 2  # the newest, and the one before, which may be on its way to the gateway


@dataclass(frozen=True)
class Denoising:
    """Runs requests against the loop that all of them share."""

    engine: DenoiserEngine
    loop: DenoiseLoop
    preparation: Preparation
    checkpoints: CheckpointWriter
    store: TensorStore
    metrics: Metrics
    models: dict[str, ModelDescription]

    async def run(
        self, request: pb.DenoiseRequest, call_seconds: float | None
    ) -> AsyncGenerator[pb.DenoiseResponse, None]:
        """Everything that happens to a request, in order. Closing the iterator stops the request within one step.

        call_seconds: time left to the call; None: no limit.

        Raises:
            SafelightError: of the kinds that DenoiserService.Denoise documents.
        """
        description = find_model(self.models, request.model).denoiser
        check_denoise(request, description)
        plan = self.preparation.plan(request)
        self.loop.check_open()
        job = await self.preparation.job(request, plan, work_deadline(request, call_seconds))
        try:
            yield pb.DenoiseResponse(queued=pb.DenoiseQueued(position=self.loop.submit(job)))
            async for event in self._steps(job):
                yield event
            yield pb.DenoiseResponse(result=await self._result(job))
        finally:
            self.loop.forget(job)
            self._release(job.leased)

    async def _steps(self, job: DenoiseJob) -> AsyncGenerator[pb.DenoiseResponse, None]:
        """The job's steps as they are computed; raises what ended it."""
        step = job.first_step
        while step < job.steps:
            event = await job.events.get()
            if isinstance(event, (StageDrainingError, ModelRestartingError)):
                if _has_unsaved_steps(job):
                    yield await self._checkpoint(job, job.state)
                job.leased.clear()  # they outlive the request, until they are fetched
            if isinstance(event, Exception):
                raise event
            step = event.step
            yield _progress(event, job.steps)
            if event.checkpoint is not None:
                yield await self._checkpoint(job, event.checkpoint)
            if event.denoised is not None:
                yield await self._preview(job, event)

    async def _checkpoint(self, job: DenoiseJob, state: SamplerState) -> pb.DenoiseResponse:
        checkpoint = await self.checkpoints.write(state, self.engine.models[job.model].fingerprint)
        job.leased.append(checkpoint.sampler_state)
        if len(job.leased) > _CHECKPOINTS_HELD:
            self._release([job.leased.popleft()])
        return pb.DenoiseResponse(checkpoint=checkpoint)

    def _release(self, checkpoints: Iterable[TensorRef]) -> None:
        """End the leases of checkpoints that nobody will ask for any more; inline ones have none."""
        self.store.release([ref.lease.ticket for ref in checkpoints])

    async def _preview(self, job: DenoiseJob, event: StepDone) -> pb.DenoiseResponse:
        preview_map = self.engine.models[job.model].preview_map
        assert preview_map is not None, "check_denoise refuses previews of a model without a map"
        assert event.denoised is not None
        with self.metrics.preview_seconds.time():
            data = await asyncio.to_thread(preview_map.picture, event.denoised)
        return pb.DenoiseResponse(preview=pb.LatentPreview(step=event.step, data=data, media_type=MEDIA_TYPE))

    async def _result(self, job: DenoiseJob) -> pb.DenoiseResult:
        latents = job.state.latents
        check_finite(latents, "latents")
        self.metrics.stage_seconds.labels("denoiser", job.model).observe(job.compute_seconds)
        self.metrics.queue_seconds.labels("denoiser").observe(job.queue_seconds)
        header = make_header(latents, _LAYOUTS[latents.ndim], self.engine.models[job.model].fingerprint)
        return pb.DenoiseResult(
            latents=await self.store.put(header, TorchPayload(latents)),
            steps_run=job.steps_run,
            determinism=DETERMINISM_CLASS_EXACT if job.exact else DETERMINISM_CLASS_ROUNDING,
            timing=StageTiming(
                stage="denoiser",
                queue_seconds=job.queue_seconds,
                compute_seconds=job.compute_seconds,
                steps=job.steps_run,
                received_bytes=job.received_bytes,
            ),
        )


def _has_unsaved_steps(job: DenoiseJob) -> bool:
    """Whether steps have been computed here that no checkpoint holds, of a request that wants checkpoints."""
    return job.checkpoints is not None and job.state.step_index > job.checkpoints.step


def _progress(event: StepDone, steps: int) -> pb.DenoiseResponse:
    return pb.DenoiseResponse(
        progress=pb.DenoiseProgress(
            step=event.step, steps=steps, step_seconds=event.seconds, batch_size=event.batch_size
        )
    )
