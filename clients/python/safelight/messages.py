"""Between the user's dataclasses (types.py) and the wire's messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from safelight.errors import InternalError, InvalidRequestError
from safelight.types import (
    Accepted,
    Event,
    GeneratedImage,
    GenerationOptions,
    GenerationResult,
    Model,
    Progress,
    Queued,
    StageSeconds,
)
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2
from safelight.v1.model_pb2 import ModelDescription

MAX_PROMPT_BYTES = 1024 * 1024
"""Longest prompt that is sent; a gateway's own limit is lower and answers with a sentence."""

FORMATS = {
    "png": work_pb2.OUTPUT_FORMAT_PNG,
    "jpeg": work_pb2.OUTPUT_FORMAT_JPEG,
    "webp": work_pb2.OUTPUT_FORMAT_WEBP,
    "latents": work_pb2.OUTPUT_FORMAT_LATENTS,
}


def to_request(options: GenerationOptions) -> pb.GenerateRequest:
    """The request for what the user asks for.

    Raises:
        InvalidRequestError: a value that the wire can't carry.
    """
    _check_prompts(options)
    if options.format not in FORMATS:
        raise InvalidRequestError.of("format", f"is {options.format!r}; choose from {', '.join(FORMATS)}")
    try:
        return _to_request(options)
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
        sampling=work_pb2.SamplingOptions(
            sampler=options.sampler or "",
            sampler_parameters=options.sampler_parameters,
            schedule=options.schedule or "",
            schedule_parameters=options.schedule_parameters,
            steps=_given("steps", options.steps),
        ),
        guidance=_guidance(options.guidance_scale),
        clip_skip=_given("clip_skip", options.clip_skip),
        num_images=_given("num_images", options.num_images),
        seeds=[] if options.seed is None else [options.seed],
        output=work_pb2.OutputOptions(
            format=FORMATS[options.format],
            quality=_given("quality", options.quality),
            omit_metadata=not options.metadata,
        ),
    )


def _guidance(scale: float | None) -> work_pb2.GuidanceOptions:
    return work_pb2.GuidanceOptions() if scale is None else work_pb2.GuidanceOptions(scale=scale)


def _given(field: str, value: int | None) -> int:
    """The value as the wire has it, where 0 says "not given"; so a zero of the user's is refused here."""
    if value == 0:
        raise InvalidRequestError.of(field, "is 0; must be at least 1, or left out for the default")
    return 0 if value is None else value


def _check_prompts(options: GenerationOptions) -> None:
    for field, prompt in (("prompt", options.prompt), ("negative_prompt", options.negative_prompt)):
        if not isinstance(prompt, str):
            raise InvalidRequestError.of(field, f"is a {type(prompt).__name__}; must be a str")
        if len(prompt) > MAX_PROMPT_BYTES:
            raise InvalidRequestError.of(field, f"has {len(prompt)} characters; shorten it to a few hundred words")


class EventReader:
    """Turns a stream of responses into events, collecting files on the way."""

    def __init__(self) -> None:
        self._request_id = ""
        self._files: dict[int, bytearray] = {}
        self._media_types: dict[int, str] = {}

    def read(self, response: pb.GenerateResponse) -> Event | None:
        """The event of a response; None if it only brought a piece of a file."""
        kind = response.WhichOneof("event")
        if kind == "chunk":
            self._collect(response.chunk)
            return None
        if kind == "accepted":
            self._request_id = response.accepted.request_id
            return Accepted(self._request_id, tuple(image.seed for image in response.accepted.images))
        if kind == "queued":
            return Queued(response.queued.image_index, response.queued.stage, response.queued.position)
        if kind == "progress":
            progress = response.progress
            return Progress(progress.image_index, progress.stage, progress.step, progress.steps)
        if kind == "result":
            return GenerationResult(self._request_id, tuple(map(self._image, response.result.images)))
        return None

    def _collect(self, chunk: work_pb2.FileChunk) -> None:
        self._files.setdefault(chunk.file_index, bytearray()).extend(chunk.data)
        if chunk.media_type:
            self._media_types[chunk.file_index] = chunk.media_type

    def _image(self, receipt: pb.ImageReceipt) -> GeneratedImage:
        data = self._files.get(receipt.image_index)
        if data is None:
            raise InternalError(f"picture {receipt.image_index} came without its file")
        parameters = receipt.parameters
        return GeneratedImage(
            data=bytes(data),
            media_type=self._media_types[receipt.image_index],
            seed=parameters.seed,
            model=parameters.model,
            width=parameters.width,
            height=parameters.height,
            steps=receipt.steps_run,
            stages=_stages(receipt.timings),
            token_count=receipt.token_count,
            truncated_prompt=receipt.truncated_prompt,
            truncated_negative_prompt=receipt.truncated_negative_prompt,
            fingerprints=dict(parameters.fingerprints),
        )


def _stages(timings: Iterable[work_pb2.StageTiming]) -> tuple[StageSeconds, ...]:
    return tuple(
        StageSeconds(timing.stage, timing.replica, timing.queue_seconds, timing.compute_seconds) for timing in timings
    )


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
        size_multiple=decoder.scale_factor,
        steps=denoiser.default_steps,
        guidance_scale=denoiser.default_guidance_scale,
        samplers=tuple(denoiser.samplers),
        schedules=tuple(denoiser.schedules),
        max_tokens=encoder.max_tokens,
        fingerprints={
            "encoder": encoder.fingerprint,
            "denoiser": denoiser.fingerprint,
            "decoder": decoder.fingerprint,
        },
    )
