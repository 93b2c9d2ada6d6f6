"""From a checked request to a job that can be stepped: conditioning fetched and projected, state begun or resumed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import Conditioning, TensorRef
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, SamplingOptions
from services.common.exchange import TensorReader
from services.common.executor import DeviceExecutor
from services.common.received_bytes import received_bytes
from services.denoiser.checkpoints import CheckpointCosts, CheckpointPace
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.engine import DenoiserEngine
from services.denoiser.guidance import guidance_rows
from services.denoiser.initial_picture import initial_refs, read_initial_latents, read_inpainting
from services.denoiser.inpainting import Inpainting
from services.denoiser.job import DenoiseJob
from services.denoiser.keyframes import Keyframes, read_keyframes
from services.denoiser.resumption import read_checkpoint
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.state import SamplerState
from services.modeling.lora.library import AdapterLibrary
from services.modeling.wire import read_tensor


@dataclass(frozen=True)
class Preparation:
    """Makes jobs of requests.

    Args:
        engine: projects conditioning and begins states, on the device's thread.
        executor: that thread.
        reader: fetches tensors.
        models: what is served.
        costs: of checkpoints.
        exchange_id: of this process's tensors.
        library: the LoRAs that are loaded.
    """

    engine: DenoiserEngine
    executor: DeviceExecutor
    reader: TensorReader
    models: Mapping[str, ModelDescription]
    costs: CheckpointCosts
    exchange_id: str
    library: AdapterLibrary

    def plan(self, request: pb.DenoiseRequest) -> SamplingPlan:
        """Sigmas and timesteps of a request.

        Raises:
            InvalidRequestError: a name or a parameter is wrong.
        """
        sampling: SamplingOptions = request.sampling
        default_steps = self.models[request.model].denoiser.default_steps
        try:
            return plan_sampling(
                self.engine.models[request.model].sampling,
                latent_shape=request.latent_shape,
                sampler=sampling.sampler,
                schedule=sampling.schedule,
                steps=sampling.steps or default_steps,
                sampler_parameters=sampling.sampler_parameters,
                schedule_parameters=sampling.schedule_parameters,
                strength=request.strength if request.HasField("strength") else 1.0,
            )
        except ValueError as error:
            raise InvalidRequestError.of("sampling", str(error)) from error

    async def job(self, request: pb.DenoiseRequest, plan: SamplingPlan, deadline: float | None) -> DenoiseJob:
        """The job of a request that `check_denoise` has passed; deadline: on the clock of `time.monotonic()`.

        Raises:
            SafelightError: a tensor of the request can't be had, or is not what it must be.
        """
        scale = self._guidance_scale(request)
        adapters = self.library.find(request.model, request.adapters)
        keyframes = await read_keyframes(self.reader, request)

        async def condition(conditioning: Conditioning, field: str) -> Any:
            prompt = await self._prompt(request, conditioning, field, keyframes)
            return await self.executor.run(lambda: self.engine.prepare(request.model, prompt, adapters))

        positive = await condition(request.conditioning, "conditioning")
        negative = None
        if guidance_rows(scale) == 2:
            negative = await condition(request.negative_conditioning, "negative_conditioning")
            self._check_alike(request.model, positive, negative)
        noise = NoiseSource(request.seed, (1, *request.latent_shape))
        picture = await read_initial_latents(self.reader, request)
        inpainting = await read_inpainting(self.reader, request, picture)
        state = await self._state(request, plan, noise, picture)
        return DenoiseJob(
            model=request.model,
            plan=plan,
            noise=noise,
            state=state,
            guidance_scale=scale,
            positive=positive,
            negative=negative,
            adapters=adapters,
            inpainting=inpainting and await self._on_device(request.model, inpainting),
            deadline=deadline,
            tenant=request.context.tenant,
            priority=request.context.priority,
            resumed=request.HasField("resume_from"),
            exact=request.determinism == DETERMINISM_CLASS_EXACT,
            checkpoints=self._pace(request, state),
            preview_every=request.preview.every_steps,
            received_bytes=received_bytes(_tensors(request, guided=negative is not None), self.exchange_id),
        )

    async def _state(
        self, request: pb.DenoiseRequest, plan: SamplingPlan, noise: NoiseSource, picture: Tensor | None
    ) -> SamplerState:
        """Where the request stands: at its checkpoint, or before its first step."""
        model = request.model
        if not request.HasField("resume_from"):
            return await self.executor.run(lambda: self.engine.start(model, plan, noise, picture))
        fingerprint = self.engine.models[model].fingerprint
        return await read_checkpoint(self.reader, request.resume_from, plan, request.latent_shape, fingerprint)

    async def _on_device(self, model: str, inpainting: Inpainting) -> Inpainting:
        return await self.executor.run(lambda: inpainting.to(self.engine.models[model].device))

    def _pace(self, request: pb.DenoiseRequest, state: SamplerState) -> CheckpointPace | None:
        if not request.HasField("checkpoints"):
            return None
        return CheckpointPace(request.checkpoints.every_steps, self.costs, state.step_index)

    def _check_alike(self, model: str, positive: Any, negative: Any) -> None:
        batch_key = self.engine.models[model].batch_key
        if batch_key(positive) != batch_key(negative):
            raise InvalidRequestError.of(
                "negative_conditioning", "must have the shape of 'conditioning'; encode both alike"
            )

    def _guidance_scale(self, request: pb.DenoiseRequest) -> float:
        if request.guidance.HasField("scale"):
            return request.guidance.scale
        return self.models[request.model].denoiser.default_guidance_scale

    async def _prompt(
        self, request: pb.DenoiseRequest, conditioning: Conditioning, field: str, keyframes: Keyframes | None
    ) -> PromptConditioning:
        refs = {named.name: named.tensor for named in conditioning.tensors}
        tensors = await asyncio.gather(
            *(read_tensor(self.reader, ref, f"{field}.{name}") for name, ref in refs.items())
        )
        return PromptConditioning(
            dict(zip(refs, tensors, strict=True)),
            field,
            tuple(request.latent_shape),
            request.guidance.distilled_scale if request.guidance.HasField("distilled_scale") else None,
            request.size_conditioning if request.HasField("size_conditioning") else None,
            keyframes,
        )


def work_deadline(request: pb.DenoiseRequest, call_seconds: float | None) -> float | None:
    """`time.monotonic()` at which the request's own deadline passes, or its call's, whichever is first; None: never.

    call_seconds: time left to the call; None: no limit.
    """
    now = time.monotonic()
    deadlines = [] if call_seconds is None else [now + call_seconds]
    if request.context.HasField("deadline"):
        deadlines.append(now + request.context.deadline.ToNanoseconds() / 1e9 - time.time())
    return min(deadlines, default=None)


def _tensors(request: pb.DenoiseRequest, guided: bool) -> list[TensorRef]:
    """The tensors that a request is prepared from."""
    prompts = [request.conditioning, *([request.negative_conditioning] if guided else [])]
    refs = [named.tensor for prompt in prompts for named in prompt.tensors]
    refs += initial_refs(request)
    refs += [request.keyframe_latents] if request.HasField("keyframe_latents") else []
    return refs + ([request.resume_from.sampler_state] if request.HasField("resume_from") else [])
