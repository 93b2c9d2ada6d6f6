"""A generation request with every default filled in."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.film import frame_count, latent_frames
from gateway.inputs import InputFiles, input_digests, input_files, strength_of
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import (
    Adapter,
    DeterminismClass,
    GenerationParameters,
    GuidanceOptions,
    OutputOptions,
    PreviewOptions,
    SamplingOptions,
    SizeConditioning,
    WorkContext,
)
from services.common.validation import MAX_SEED


@dataclass(frozen=True)
class GenerationPlan:
    """What the stages are asked for.

    Args:
        model: description of the model.
        context: who asks, with the request's deadline and the fingerprints of the weights that are to make it.
        images: the parameters of each picture.
        latent_shape: [C, H, W] of every picture's latent, [C, T, H, W] of a film's.
        output: how the files are written.
        determinism: how equal repeated runs must be.
        preview: when to send previews.
        inputs: the files that every picture starts from.
        steps_saved: steps that were asked for and are left out of every picture.
    """

    model: ModelDescription
    context: WorkContext
    images: Sequence[GenerationParameters]
    latent_shape: tuple[int, ...]
    output: OutputOptions
    determinism: DeterminismClass.ValueType
    preview: PreviewOptions
    inputs: InputFiles
    steps_saved: int = 0

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the weights of each stage."""
        return self.context.fingerprints

    @property
    def strength(self) -> float:
        """How much of its input picture or film every picture replaces; 1 without one."""
        return self.images[0].strength if self.images[0].HasField("strength") else 1.0

    @property
    def calls_per_step(self) -> int:
        """Model calls of a step of the sampler, but of the last step."""
        return self.model.denoiser.calls_per_step.get(self.images[0].sampling.sampler, 1)

    def with_model(self, model: ModelDescription) -> GenerationPlan:
        """The plan for another revision of its model: other weights, all else as it was told to the client."""
        context, images = WorkContext(), [_copy(image) for image in self.images]
        context.CopyFrom(self.context)
        for fingerprints in (context.fingerprints, *(image.fingerprints for image in images)):
            fingerprints.update(_fingerprints(model))
        return replace(self, model=model, context=context, images=images)


def make_plan(request: GenerateRequest, model: ModelDescription) -> GenerationPlan:
    """The plan of a request that `check_generate` has passed, filled in by `with_measures_of_inputs`."""
    width, height = _size(request, model)
    factor, frames = model.decoder.scale_factor, latent_frames(frame_count(request, model), model)
    return GenerationPlan(
        model=model,
        context=_context(request, model),
        images=[_parameters(request, model, width, height, seed) for seed in _seeds(request)],
        latent_shape=(model.denoiser.latent_channels, *frames, height // factor, width // factor),
        output=_output(request.output, model),
        determinism=request.determinism,
        preview=request.preview,
        inputs=input_files(request, model),
    )


def _context(request: GenerateRequest, model: ModelDescription) -> WorkContext:
    context = WorkContext()
    context.CopyFrom(request.context)
    context.fingerprints.clear()
    context.fingerprints.update(_fingerprints(model))
    return context


def _copy(image: GenerationParameters) -> GenerationParameters:
    copied = GenerationParameters()
    copied.CopyFrom(image)
    return copied


def _fingerprints(model: ModelDescription) -> dict[str, str]:
    """Of the weights of each stage."""
    return {
        "encoder": model.encoder.fingerprint,
        "denoiser": model.denoiser.fingerprint,
        "decoder": model.decoder.fingerprint,
    }


def _size(request: GenerateRequest, model: ModelDescription) -> tuple[int, int]:
    """Width and height in pixels."""
    factor, denoiser = model.decoder.scale_factor, model.denoiser
    return (
        request.width or denoiser.default_latent_width * factor,
        request.height or denoiser.default_latent_height * factor,
    )


def _output(given: OutputOptions, model: ModelDescription) -> OutputOptions:
    output = OutputOptions()
    output.CopyFrom(given)
    output.format = given.format or model.decoder.formats[0]
    return output


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
        num_frames=frame_count(request, model),
        fps=request.fps or model.denoiser.default_fps,
        sampling=_sampling(request.sampling, model),
        guidance=_guidance(request.guidance, model),
        clip_skip=request.clip_skip or model.encoder.default_clip_skip,
        seed=seed,
        fingerprints=_fingerprints(model),
        size_conditioning=(
            _told_sizes(request.size_conditioning, width, height) if model.denoiser.size_conditioning else None
        ),
        inputs=input_digests(request.inputs),
        strength=strength_of(request, model),
        adapters=_adapters(request, model),
    )


def _adapters(request: GenerateRequest, model: ModelDescription) -> list[Adapter]:
    """The request's LoRAs, with the scale and the fingerprint that each has."""
    loaded = {adapter.name: adapter.fingerprint for adapter in model.adapters}
    return [
        Adapter(name=each.name, scale=each.scale if each.HasField("scale") else 1.0, fingerprint=loaded[each.name])
        for each in request.adapters
    ]


def _sampling(given: SamplingOptions, model: ModelDescription) -> SamplingOptions:
    sampling = SamplingOptions()
    sampling.CopyFrom(given)
    sampling.sampler = given.sampler or model.denoiser.samplers[0]
    sampling.schedule = given.schedule or model.denoiser.schedules[0]
    sampling.steps = given.steps or model.denoiser.default_steps
    return sampling


def _told_sizes(given: SizeConditioning, width: int, height: int) -> SizeConditioning:
    """The sizes that the model is told: unless they are given, those of the picture, uncropped."""
    sizes = SizeConditioning(original_width=width, original_height=height, target_width=width, target_height=height)
    sizes.MergeFrom(given)
    return sizes


def _guidance(given: GuidanceOptions, model: ModelDescription) -> GuidanceOptions:
    denoiser = model.denoiser
    guidance = GuidanceOptions(scale=given.scale if given.HasField("scale") else denoiser.default_guidance_scale)
    if denoiser.HasField("default_distilled_scale"):
        usual = denoiser.default_distilled_scale
        guidance.distilled_scale = given.distilled_scale if given.HasField("distilled_scale") else usual
    return guidance
