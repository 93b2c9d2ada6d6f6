"""What a denoise request must be before any work is done for it. Pure: messages and descriptions in, errors out."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from safelight.errors import FieldViolation, InvalidRequestError, UnsupportedError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.model_pb2 import DenoiserDescription
from safelight.v1.tensor_pb2 import DATA_TYPE_FLOAT32, DATA_TYPE_UINT8, TensorRef
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK, MEDIA_ROLE_VIDEO
from services.common.fingerprints import (
    check_conditioning_fingerprints,
    check_own_fingerprint,
    check_tensor_fingerprint,
)
from services.common.validation import (
    check_adapters,
    check_deadline,
    check_determinism,
    check_range,
    check_seed,
    check_size_conditioning,
    refuse_unserved,
)

_MIN_EXTENT = 1
_MAX_GUIDANCE_SCALE = 100


def check_denoise(request: pb.DenoiseRequest, model: DenoiserDescription) -> None:
    """Check a request against its model.

    Raises:
        UnsupportedError: a field is set that this release, or this model, does not serve.
        InvalidRequestError: fields are out of range; every one is named.
        FingerprintMismatchError: it was planned with other weights, or its conditioning was made by others.
    """
    if request.preview.every_steps > 0 and not model.previews:
        raise UnsupportedError(
            f"preview: model {request.model!r} has no map from latents to colours: make one with "
            "examples/fit_latent_preview.py, or leave it out",
            field="preview",
        )
    if not model.size_conditioning:
        refuse_unserved(request, ["size_conditioning"], request.model)
    if not model.max_keyframes:
        refuse_unserved(request, ["keyframe_latents", "keyframe_indices"], request.model)
    if model.max_keyframes or not {MEDIA_ROLE_IMAGE, MEDIA_ROLE_VIDEO} & {*model.inputs}:
        refuse_unserved(request, ["initial_latents"], request.model)
    if MEDIA_ROLE_MASK not in model.inputs:
        refuse_unserved(request, ["mask"], request.model)
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)
    check_own_fingerprint(request.context, "denoiser", model.fingerprint)
    check_conditioning_fingerprints(request.context, request.conditioning, "conditioning")
    check_conditioning_fingerprints(request.context, request.negative_conditioning, "negative_conditioning")
    check_tensor_fingerprint(request.context, "decoder", request.initial_latents.header, "initial_latents")
    check_tensor_fingerprint(request.context, "decoder", request.keyframe_latents.header, "keyframe_latents")


def _violations(request: pb.DenoiseRequest, model: DenoiserDescription) -> Iterator[FieldViolation]:
    yield from check_seed("seed", request.seed)
    yield from check_range("sampling.steps", request.sampling.steps, 0, model.max_steps)
    yield from check_size_conditioning(request.size_conditioning)
    yield from check_range("guidance.scale", request.guidance.scale, 0, _MAX_GUIDANCE_SCALE)
    yield from check_range("guidance.distilled_scale", request.guidance.distilled_scale, 0, _MAX_GUIDANCE_SCALE)
    if request.guidance.HasField("distilled_scale") and not model.HasField("default_distilled_scale"):
        yield FieldViolation("guidance.distilled_scale", f"model {request.model!r} takes none; leave it out")
    yield from check_range("context.priority", request.context.priority, -100, 100)
    yield from check_deadline(request.context)
    yield from check_adapters(request.adapters)
    yield from check_range("preview.every_steps", request.preview.every_steps, 0, model.max_steps)
    yield from check_range("checkpoints.every_steps", request.checkpoints.every_steps, 0, model.max_steps)
    yield from check_determinism(request.determinism)
    yield from _shape_violations(list(request.latent_shape), model)
    yield from _initial_violations(request)
    if model.max_keyframes:
        yield from _keyframe_violations(request, model)
    if not request.conditioning.tensors:
        yield FieldViolation("conditioning", "has no tensors; run the encoder first")
    if request.guidance.scale > 1 and not request.negative_conditioning.tensors:
        yield FieldViolation("negative_conditioning", "is needed for a guidance scale above 1; encode the empty prompt")
    if request.HasField("resume_from"):
        yield from _resume_violations(request, request.sampling.steps or model.default_steps)


def _shape_violations(shape: list[int], model: DenoiserDescription) -> Iterator[FieldViolation]:
    axes = ["frames", "height", "width"] if model.default_latent_frames else ["height", "width"]
    height, width = shape[-2:] if len(shape) > 1 else (0, 0)
    if len(shape) != 1 + len(axes) or shape[0] != model.latent_channels or min(shape) < _MIN_EXTENT:
        yield FieldViolation("latent_shape", f"is {shape}; must be [{model.latent_channels}, {', '.join(axes)}]")
    elif any(extent % max(model.latent_multiple, 1) for extent in (height, width)):
        yield FieldViolation(
            "latent_shape", f"is {shape}; height and width must be multiples of {model.latent_multiple}"
        )
    elif height * width > model.max_latent_area:
        yield FieldViolation(
            "latent_shape", f"{height}x{width} is more than the {model.max_latent_area} elements allowed"
        )
    elif model.max_latent_volume and prod(shape[1:]) > model.max_latent_volume:
        yield FieldViolation(
            "latent_shape", f"{shape[1:]} is more than the {model.max_latent_volume} elements of a film allowed"
        )


def _initial_violations(request: pb.DenoiseRequest) -> Iterator[FieldViolation]:
    if not request.HasField("initial_latents"):
        for field in ("strength", "mask"):
            if request.HasField(field):
                yield FieldViolation(field, "needs initial_latents; have the decoder encode them, or leave it out")
        return
    yield from check_range("strength", request.strength, 0, 1)
    yield from _float_violations("initial_latents", request.initial_latents, [1, *request.latent_shape])
    if request.HasField("mask"):
        yield from _float_violations("mask", request.mask, [1, 1, *request.latent_shape[1:]])


def _keyframe_violations(request: pb.DenoiseRequest, model: DenoiserDescription) -> Iterator[FieldViolation]:
    """What is wrong with the keyframes of a model that is led through some; how long the film is, the model knows."""
    indices, least, most = list(request.keyframe_indices), model.min_keyframes, model.max_keyframes
    if not least <= len(indices) <= most or indices != sorted(set(indices)) or min(indices, default=0) < 0:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        yield FieldViolation("keyframe_indices", f"are {indices[: most + 1]}; must be {wanted} rising frame numbers")
    if request.HasField("keyframe_latents"):
        yield from _float_violations("keyframe_latents", request.keyframe_latents, [1, *request.latent_shape])
    elif indices or least:
        yield FieldViolation("keyframe_latents", "are needed: have the decoder encode the pictures of the film")


def _float_violations(field: str, ref: TensorRef, shape: list[int]) -> Iterator[FieldViolation]:
    header = ref.header
    if header.dtype != DATA_TYPE_FLOAT32 or list(header.shape) != shape:
        yield FieldViolation(field, f"is {list(header.shape)} of dtype {header.dtype}; must be {shape} of float32")


def _resume_violations(request: pb.DenoiseRequest, steps: int) -> Iterator[FieldViolation]:
    """What can be told of a checkpoint without its bytes."""
    yield from check_range("resume_from.step", request.resume_from.step, 0, steps - 1)
    if request.resume_from.sampler_state.header.dtype != DATA_TYPE_UINT8:
        yield FieldViolation("resume_from.sampler_state", "must be a checkpoint's, of bytes; leave resume_from out")
