"""What a generation request must be before any stage sees it. Pure: messages and descriptions in, violations out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from gateway.film import film_violations
from gateway.inputs import IMAGE_EMBEDS, input_violations
from gateway.picture_sizes import MIN_PIXELS, largest_area, size_multiple
from safelight.errors import FieldViolation, InvalidRequestError, UnknownAdapterError, UnsupportedError
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, OUTPUT_FORMAT_UNSPECIFIED, Adapter, OutputFormat
from services.common.fingerprints import check_own_fingerprint
from services.common.validation import (
    check_adapters,
    check_deadline,
    check_determinism,
    check_range,
    check_seed,
    check_size_conditioning,
    refuse_unserved,
)

MAX_IMAGES = 64
MAX_GUIDANCE_SCALE = 100


def check_generate(request: GenerateRequest, model: ModelDescription) -> None:
    """Check a request against its model.

    Raises:
        UnsupportedError: a field is set that this release, or this model, does not serve.
        InvalidRequestError: fields are out of range; every one is named.
        UnknownAdapterError: it names a LoRA that is not loaded, or another one than is.
        FingerprintMismatchError: it asks for other weights than those that are served.
    """
    refuse_unserved(request, () if model.denoiser.inputs else ("inputs",), model.name)
    if request.preview.every_steps and not model.denoiser.previews:
        raise UnsupportedError(
            f"preview: model {model.name!r} has no map from latents to colours; leave it out", field="preview"
        )
    if not model.denoiser.size_conditioning:
        refuse_unserved(request, ["size_conditioning"], model.name)
    if not model.decoder.frames_per_latent:
        refuse_unserved(request, ("num_frames", "fps"), model.name)
    if IMAGE_EMBEDS in model.denoiser.conditioning and MEDIA_ROLE_IMAGE not in model.encoder.inputs:
        raise UnsupportedError(
            f"inputs: model {model.name!r} needs an image encoder, which its encoder does not have: name the file in "
            "the manifest (encoder: {parts: {image_encoder: {path: …}}}), or the config's image_encoder_path",
            field="inputs",
        )
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)
    _check_loaded(request.adapters, model)
    for stage in ("encoder", "denoiser", "decoder"):
        check_own_fingerprint(request.context, stage, getattr(model, stage).fingerprint)


def _check_loaded(adapters: Iterable[Adapter], model: ModelDescription) -> None:
    loaded = {adapter.name: adapter.fingerprint for adapter in model.adapters}
    for adapter in adapters:
        if adapter.name not in loaded or adapter.fingerprint not in ("", loaded[adapter.name]):
            what = "is another file now" if adapter.name in loaded else "is not loaded"
            raise UnknownAdapterError(
                f"adapter {adapter.name!r} of model {model.name!r} {what}; loaded are: {', '.join(loaded) or 'none'}",
                adapter=adapter.name,
                model=model.name,
            )


def _violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    yield from _prompt_violations(request, model)
    yield from _size_violations(request, model)
    yield from check_size_conditioning(request.size_conditioning)
    yield from input_violations(request, model)
    if model.decoder.frames_per_latent:
        yield from film_violations(request, model)
    yield from _sampling_violations(request, model)
    yield from _seed_violations(request)
    yield from _output_violations(request, model)
    yield from check_range("clip_skip", request.clip_skip, 0, model.encoder.max_clip_skip)
    yield from check_determinism(request.determinism)
    yield from check_range("preview.every_steps", request.preview.every_steps, 0, model.denoiser.max_steps)
    yield from check_range("context.priority", request.context.priority, -100, 100)
    yield from check_deadline(request.context)
    yield from check_adapters(request.adapters)


def _prompt_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    limit = model.encoder.max_prompt_bytes
    for field, prompt in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        size = len(prompt.encode())
        if size > limit:
            yield FieldViolation(field, f"has {size} bytes; must have at most {limit}: shorten it")


def _size_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    factor = size_multiple(model)
    for field, pixels in (("width", request.width), ("height", request.height)):
        if pixels and (pixels < MIN_PIXELS or pixels % factor):
            nearest = max(MIN_PIXELS, round(pixels / factor) * factor)
            yield FieldViolation(
                field, f"is {pixels}; must be a multiple of {factor}, at least {MIN_PIXELS}: try {nearest}"
            )
    area, limit = request.width * request.height, largest_area(model)
    if area > limit:
        yield FieldViolation("width", f"{request.width}x{request.height} has more than the {limit} pixels allowed")


def _sampling_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    sampling, denoiser = request.sampling, model.denoiser
    if request.HasField("sampling") and (sampling.steps < 0 or sampling.steps > denoiser.max_steps):
        yield from check_range("sampling.steps", sampling.steps, 1, denoiser.max_steps)
    yield from check_range("sampling.min_steps", sampling.min_steps, 0, max(sampling.steps, 0) or denoiser.max_steps)
    yield from _choice("sampling.sampler", sampling.sampler, denoiser.samplers)
    yield from _choice("sampling.schedule", sampling.schedule, denoiser.schedules)
    yield from check_range("guidance.scale", request.guidance.scale, 0, MAX_GUIDANCE_SCALE)
    yield from check_range("guidance.distilled_scale", request.guidance.distilled_scale, 0, MAX_GUIDANCE_SCALE)
    if request.guidance.HasField("distilled_scale") and not denoiser.HasField("default_distilled_scale"):
        yield FieldViolation("guidance.distilled_scale", f"model {model.name!r} takes none; leave it out")


def _choice(field: str, value: str, choices: Collection[str]) -> Iterator[FieldViolation]:
    if value and value not in choices:
        yield FieldViolation(field, f"is {value!r}; choose from {', '.join(choices)}")


def _seed_violations(request: GenerateRequest) -> Iterator[FieldViolation]:
    yield from check_range("num_images", request.num_images, 0, MAX_IMAGES)
    yield from check_range("seeds", len(request.seeds), 0, MAX_IMAGES)
    for index, seed in enumerate(request.seeds):
        yield from check_seed(f"seeds[{index}]", seed)
    if len(request.seeds) > 1 and request.num_images not in (0, len(request.seeds)):
        yield FieldViolation(
            "seeds", f"has {len(request.seeds)} for {request.num_images} pictures; give one or as many"
        )


def _output_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    output = request.output
    yield from check_range("output.quality", output.quality, 0, 100)
    if output.format != OUTPUT_FORMAT_UNSPECIFIED and output.format not in model.decoder.formats:
        known = ", ".join(OutputFormat.Name(known) for known in model.decoder.formats)
        yield FieldViolation("output.format", f"is {output.format}; choose from {known}")
