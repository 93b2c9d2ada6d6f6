"""From the user's dataclasses to the wire's messages, and models back; event_reader.py has the way back of the rest."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import TypeVar

from safelight.errors import InvalidRequestError
from safelight.input_films import film_file
from safelight.input_pictures import picture_files
from safelight.options import GenerationOptions
from safelight.types import Adapter, AdapterReport, Model
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2
from safelight.v1.adapter_service_pb2 import AdapterDescription
from safelight.v1.model_pb2 import ModelDescription

MAX_PROMPT_BYTES = 1024 * 1024
"""Longest prompt that is sent; a gateway's own limit is lower and answers with a sentence."""

FORMATS = {
    "png": work_pb2.OUTPUT_FORMAT_PNG,
    "jpeg": work_pb2.OUTPUT_FORMAT_JPEG,
    "webp": work_pb2.OUTPUT_FORMAT_WEBP,
    "mp4": work_pb2.OUTPUT_FORMAT_MP4,
    "webm": work_pb2.OUTPUT_FORMAT_WEBM,
    "gif": work_pb2.OUTPUT_FORMAT_GIF,
    "png_frames": work_pb2.OUTPUT_FORMAT_PNG_FRAMES,
    "latents": work_pb2.OUTPUT_FORMAT_LATENTS,
}
DETERMINISM = {
    "default": work_pb2.DETERMINISM_CLASS_UNSPECIFIED,
    "exact": work_pb2.DETERMINISM_CLASS_EXACT,
}
INPUT_ROLES = {
    "image": work_pb2.MEDIA_ROLE_IMAGE,
    "mask": work_pb2.MEDIA_ROLE_MASK,
    "video": work_pb2.MEDIA_ROLE_VIDEO,
}

_LONGEST_TIMEOUT_SECONDS = 366 * 86_400.0


def to_request(
    options: GenerationOptions, *, idempotency_key: str = "", timeout_seconds: float | None = None
) -> pb.GenerateRequest:
    """The request for what the user asks for.

    Args:
        options: what to make.
        idempotency_key: names the request, so that it runs once however often it is sent.
        timeout_seconds: from now until its result is worthless; None: no limit.

    Raises:
        InvalidRequestError: a value that the wire can't carry.
    """
    _check_prompts(options)
    if options.format is not None:
        _check_choice("format", options.format, FORMATS)
    _check_choice("determinism", options.determinism, DETERMINISM)
    try:
        request = _to_request(options)
        request.context.idempotency_key = idempotency_key
        if timeout_seconds is not None:
            request.context.deadline.FromNanoseconds(_deadline_nanoseconds(timeout_seconds))
        return request
    except InvalidRequestError:
        raise
    except (ValueError, TypeError) as error:  # protobuf's own check of type and range
        raise InvalidRequestError(f"a value of the request can't be sent: {error}") from error


def _to_request(options: GenerationOptions) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        context=work_pb2.WorkContext(tenant=options.tenant, priority=options.priority),
        model=options.model or "",
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        width=_given("width", options.width),
        height=_given("height", options.height),
        inputs=_inputs(options),
        strength=options.strength,
        adapters=[
            work_pb2.Adapter(name=name, scale=scale, fingerprint=options.adapter_fingerprints.get(name, ""))
            for name, scale in options.adapters.items()
        ],
        num_frames=_given("num_frames", options.num_frames),
        fps=_given("fps", options.fps),
        sampling=work_pb2.SamplingOptions(
            sampler=options.sampler or "",
            sampler_parameters=options.sampler_parameters,
            schedule=options.schedule or "",
            schedule_parameters=options.schedule_parameters,
            steps=_given("steps", options.steps),
            min_steps=_given("min_steps", options.min_steps),
        ),
        guidance=work_pb2.GuidanceOptions(
            scale=options.guidance_scale, distilled_scale=options.distilled_guidance_scale
        ),
        clip_skip=_given("clip_skip", options.clip_skip),
        num_images=_given("num_images", options.num_images),
        seeds=[] if options.seed is None else [options.seed],
        output=work_pb2.OutputOptions(
            format=work_pb2.OUTPUT_FORMAT_UNSPECIFIED if options.format is None else FORMATS[options.format],
            quality=_given("quality", options.quality),
            omit_metadata=not options.metadata,
        ),
        preview=_preview(options.preview_every_steps),
        determinism=DETERMINISM[options.determinism],
        size_conditioning=_sizes(options),
    )


def _sizes(options: GenerationOptions) -> work_pb2.SizeConditioning | None:
    if options.original_size is None and options.crop is None and options.target_size is None:
        return None
    original, target = _size("original_size", options.original_size), _size("target_size", options.target_size)
    left, top = options.crop or (0, 0)
    return work_pb2.SizeConditioning(
        original_width=original[0],
        original_height=original[1],
        crop_left=left,
        crop_top=top,
        target_width=target[0],
        target_height=target[1],
    )


def _size(field: str, size: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height as the wire has them."""
    width, height = (None, None) if size is None else size
    return _given(field, width), _given(field, height)


def _inputs(options: GenerationOptions) -> list[work_pb2.MediaInput]:
    files = [("image", data) for data in picture_files("image", options.image)]
    files += [("mask", data) for data in picture_files("mask", options.mask)]
    if options.video is not None:
        files.append(("video", film_file("video", options.video, options.fps)))
    return [work_pb2.MediaInput(role=INPUT_ROLES[field], data=data) for field, data in files]


def _preview(every_steps: int | None) -> work_pb2.PreviewOptions | None:
    if every_steps is None:
        return None
    return work_pb2.PreviewOptions(every_steps=_given("preview_every_steps", every_steps))


def _deadline_nanoseconds(timeout_seconds: float) -> int:
    """The moment a time from now, in nanoseconds since the epoch."""
    if not 0 < timeout_seconds <= _LONGEST_TIMEOUT_SECONDS:
        raise InvalidRequestError.of(
            "timeout_seconds", f"is {timeout_seconds}; must be above 0 and at most a year, or None for no limit"
        )
    return time.time_ns() + round(timeout_seconds * 1e9)


Number = TypeVar("Number", int, float)


def _given(field: str, value: Number | None) -> Number | int:
    """The value as the wire has it, where 0 says "not given"; so a zero of the user's is refused here."""
    if value == 0:
        least = "at least 1" if isinstance(value, int) else "more"
        raise InvalidRequestError.of(field, f"is 0; must be {least}, or left out for the default")
    return 0 if value is None else value


def _check_choice(field: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InvalidRequestError.of(field, f"is {value!r}; choose from {', '.join(choices)}")


def _check_prompts(options: GenerationOptions) -> None:
    for field, prompt in (("prompt", options.prompt), ("negative_prompt", options.negative_prompt)):
        if not isinstance(prompt, str):
            raise InvalidRequestError.of(field, f"is a {type(prompt).__name__}; must be a str")
        if len(prompt) > MAX_PROMPT_BYTES:
            raise InvalidRequestError.of(field, f"has {len(prompt)} characters; shorten it to a few hundred words")


def to_models(descriptions: Sequence[ModelDescription]) -> list[Model]:
    """The models of a gateway's answer."""
    return [_to_model(description) for description in descriptions]


def _to_model(description: ModelDescription) -> Model:
    encoder, denoiser, decoder = description.encoder, description.denoiser, description.decoder
    return Model(
        name=description.name,
        family=description.family,
        width=denoiser.default_latent_width * decoder.scale_factor,
        height=denoiser.default_latent_height * decoder.scale_factor,
        size_multiple=decoder.scale_factor * max(denoiser.latent_multiple, 1),
        steps=denoiser.default_steps,
        guidance_scale=denoiser.default_guidance_scale,
        distilled_guidance_scale=(
            denoiser.default_distilled_scale if denoiser.HasField("default_distilled_scale") else None
        ),
        num_frames=_default_frames(description),
        fps=denoiser.default_fps or None,
        samplers=tuple(denoiser.samplers),
        schedules=tuple(denoiser.schedules),
        max_tokens=encoder.max_tokens,
        adapters=tuple(adapter.name for adapter in description.adapters),
        inputs=tuple(name for name, role in INPUT_ROLES.items() if role in denoiser.inputs),
        fingerprints={
            "encoder": encoder.fingerprint,
            "denoiser": denoiser.fingerprint,
            "decoder": decoder.fingerprint,
        },
    )


def _default_frames(description: ModelDescription) -> int | None:
    """Frames of a film that is not told how long it shall be; None for a model that makes pictures."""
    latent_frames = description.denoiser.default_latent_frames
    return 1 + (latent_frames - 1) * description.decoder.frames_per_latent if latent_frames else None


def to_adapter(description: AdapterDescription) -> Adapter:
    """The adapter that a gateway describes."""
    return Adapter(
        name=description.name,
        path=description.path,
        fingerprint=description.fingerprint,
        reports=tuple(
            AdapterReport(
                stage=report.stage,
                replica=report.replica,
                layout=report.layout,
                matched_keys=report.matched_keys,
                unmatched_keys=tuple(report.unmatched_keys),
                unmatched_count=report.unmatched_count,
                bytes=report.bytes,
            )
            for report in description.reports
        ),
    )
