"""The life of one denoise request: check, fetch conditioning, prepare, queue, steps, hand the latent off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import Conditioning
from safelight.v1.work_pb2 import DETERMINISM_CLASS_ROUNDING, SamplingOptions, StageTiming
from services.common.exchange import TensorReader, TensorStore
from services.common.executor import DeviceExecutor
from services.common.metrics import Metrics
from services.common.model_servicer import find_model
from services.denoiser.engine import DenoiserEngine
from services.denoiser.guidance import guidance_rows
from services.denoiser.job import DenoiseJob, StepDone
from services.denoiser.loop import DenoiseLoop
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import SamplingPlan
from services.denoiser.validation import check_denoise
from services.modeling.wire import TorchPayload, check_finite, make_header, read_tensor


@dataclass(frozen=True)
class Queued:
    """The request waits; so many were there before it."""

    position: int


@dataclass(frozen=True)
class Finished:
    """The latent is done and waits for its consumer."""

    result: pb.DenoiseResult


@dataclass(frozen=True)
class Denoising:
    """Runs requests against the loop that all of them share."""

    engine: DenoiserEngine
    loop: DenoiseLoop
    executor: DeviceExecutor
    reader: TensorReader
    store: TensorStore
    metrics: Metrics
    models: dict[str, ModelDescription]

    async def run(self, request: pb.DenoiseRequest) -> AsyncGenerator[Queued | StepDone | Finished, None]:
        """Everything that happens to a request, in order. Closing the iterator stops the request within one step.

        Raises:
            SafelightError: of the kinds that DenoiserService.Denoise documents.
        """
        description = find_model(self.models, request.model).denoiser
        check_denoise(request, description)
        plan = self._plan(request.model, request.sampling)
        self.loop.check_capacity()
        job = await self._prepare(request, plan)
        try:
            yield Queued(self.loop.submit(job, self._batch_key(job)))
            async for step in _steps(job):
                yield step
            yield Finished(self._finish(job))
        finally:
            self.loop.forget(job)

    def _plan(self, model: str, sampling: SamplingOptions) -> SamplingPlan:
        description = self.models[model].denoiser
        try:
            return plan_sampling(
                self.engine.models[model].noise_schedule,
                sampler=sampling.sampler or description.samplers[0],
                schedule=sampling.schedule or description.schedules[0],
                steps=sampling.steps or description.default_steps,
                sampler_parameters=sampling.sampler_parameters,
                schedule_parameters=sampling.schedule_parameters,
            )
        except ValueError as error:
            raise InvalidRequestError.of("sampling", str(error)) from error

    async def _prepare(self, request: pb.DenoiseRequest, plan: SamplingPlan) -> DenoiseJob:
        scale = self._guidance_scale(request)
        positive = await self._condition(request.model, request.conditioning, "conditioning")
        negative = None
        if guidance_rows(scale) == 2:
            negative = await self._condition(request.model, request.negative_conditioning, "negative_conditioning")
            self._check_alike(request.model, positive, negative)
        noise = NoiseSource(request.seed, (1, *request.latent_shape))
        deadline = request.context.deadline
        return DenoiseJob(
            model=request.model,
            plan=plan,
            noise=noise,
            state=await self.executor.run(lambda: self.engine.start(request.model, plan, noise)),
            guidance_scale=scale,
            positive=positive,
            negative=negative,
            deadline=deadline.ToNanoseconds() / 1e9 if request.context.HasField("deadline") else None,
        )

    def _check_alike(self, model: str, positive: Any, negative: Any) -> None:
        batch_key = self.engine.models[model].batch_key
        if batch_key(positive) != batch_key(negative):
            raise InvalidRequestError.of(
                "negative_conditioning", "must have the shape of 'conditioning'; encode both alike"
            )

    def _batch_key(self, job: DenoiseJob) -> Hashable:
        """Requests of equal key can share a forward pass."""
        conditioning_key = self.engine.models[job.model].batch_key(job.positive)
        return (job.model, job.state.latents.shape, conditioning_key)

    def _guidance_scale(self, request: pb.DenoiseRequest) -> float:
        if request.guidance.HasField("scale"):
            return request.guidance.scale
        return self.models[request.model].denoiser.default_guidance_scale

    async def _condition(self, model: str, conditioning: Conditioning, field: str) -> Any:
        refs = {named.name: named.tensor for named in conditioning.tensors}
        tensors = await asyncio.gather(
            *(read_tensor(self.reader, ref, f"{field}.{name}") for name, ref in refs.items())
        )
        named_tensors: Mapping[str, Tensor] = dict(zip(refs, tensors, strict=True))
        return await self.executor.run(lambda: self.engine.prepare(model, named_tensors, field))

    def _finish(self, job: DenoiseJob) -> pb.DenoiseResult:
        latents = job.state.latents
        check_finite(latents, "latents")
        self.metrics.stage_seconds.labels("denoiser", job.model).observe(job.compute_seconds)
        self.metrics.queue_seconds.labels("denoiser").observe(job.queue_seconds)
        header = make_header(latents, "BCHW", self.engine.models[job.model].fingerprint)
        return pb.DenoiseResult(
            latents=self.store.put(header, TorchPayload(latents)),
            steps_run=job.steps,
            determinism=DETERMINISM_CLASS_ROUNDING,
            timing=StageTiming(stage="denoiser", queue_seconds=job.queue_seconds, compute_seconds=job.compute_seconds),
        )


async def _steps(job: DenoiseJob) -> AsyncIterator[StepDone]:
    """The job's steps as they are computed; raises what ended it."""
    done = 0
    while done < job.steps:
        event = await job.events.get()
        if isinstance(event, Exception):
            raise event
        done = event.step
        yield event
