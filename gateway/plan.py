"""A generation request with every default filled in."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import (
    GenerationParameters,
    GuidanceOptions,
    OutputOptions,
    SamplingOptions,
    WorkContext,
)
from services.common.validation import MAX_SEED


@dataclass(frozen=True)
class GenerationPlan:
    """What the stages are asked for.

    Args:
        model: description of the model.
        context: who asks, with the request's id and deadline.
        images: the parameters of each picture.
        latent_shape: [C, H, W] of every picture's latent.
        output: how the files are written.
        steps_saved: steps that were asked for and left out, as `min_steps` allows.
    """

    model: ModelDescription
    context: WorkContext
    images: Sequence[GenerationParameters]
    latent_shape: tuple[int, int, int]
    output: OutputOptions
    steps_saved: int = 0

    @property
    def request_id(self) -> str:
        """Names the request in every stage's log."""
        return self.context.request_id


def make_plan(request: GenerateRequest, model: ModelDescription) -> GenerationPlan:
    """The plan of a request that `check_generate` has passed."""
    width, height = _size(request, model)
    factor = model.decoder.scale_factor
    return GenerationPlan(
        model=model,
        context=_context(request),
        images=[_parameters(request, model, width, height, seed) for seed in _seeds(request)],
        latent_shape=(model.denoiser.latent_channels, height // factor, width // factor),
        output=request.output,
    )


def _context(request: GenerateRequest) -> WorkContext:
    context = WorkContext()
    context.CopyFrom(request.context)
    context.request_id = context.request_id or uuid.uuid4().hex
    return context


def _size(request: GenerateRequest, model: ModelDescription) -> tuple[int, int]:
    """Width and height in pixels."""
    factor, denoiser = model.decoder.scale_factor, model.denoiser
    return (
        request.width or denoiser.default_latent_width * factor,
        request.height or denoiser.default_latent_height * factor,
    )


def _seeds(request: GenerateRequest) -> list[int]:
    """A seed for each picture; one that was given counts up, none is drawn small enough to type again."""
    if len(request.seeds) > 1:
        return list(request.seeds)
    first = request.seeds[0] if request.seeds else secrets.randbelow(2**32)
    return [(first + index) % (MAX_SEED + 1) for index in range(request.num_images or 1)]


def _parameters(
    request: GenerateRequest, model: ModelDescription, width: int, height: int, seed: int
) -> GenerationParameters:
    return GenerationParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        model=model.name,
        width=width,
        height=height,
        sampling=_sampling(request.sampling, model),
        guidance=_guidance(request.guidance, model),
        clip_skip=request.clip_skip or model.encoder.default_clip_skip,
        seed=seed,
        fingerprints={
            "encoder": model.encoder.fingerprint,
            "denoiser": model.denoiser.fingerprint,
            "decoder": model.decoder.fingerprint,
        },
    )


def _sampling(given: SamplingOptions, model: ModelDescription) -> SamplingOptions:
    sampling = SamplingOptions()
    sampling.CopyFrom(given)
    sampling.sampler = given.sampler or model.denoiser.samplers[0]
    sampling.schedule = given.schedule or model.denoiser.schedules[0]
    sampling.steps = given.steps or model.denoiser.default_steps
    return sampling


def _guidance(given: GuidanceOptions, model: ModelDescription) -> GuidanceOptions:
    scale = given.scale if given.HasField("scale") else model.denoiser.default_guidance_scale
    return GuidanceOptions(scale=scale)
