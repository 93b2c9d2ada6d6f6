"""What a denoise request must be before any work is done for it. Pure: messages and descriptions in, errors out."""

from __future__ import annotations

from collections.abc import Iterator

from safelight.errors import FieldViolation, InvalidRequestError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.model_pb2 import DenoiserDescription
from services.common.validation import check_range, check_seed, refuse_unserved

_MIN_EXTENT = 1
_UNSERVED = ("adapters", "initial_latents", "strength", "mask", "preview", "checkpoints", "resume_from")


def check_denoise(request: pb.DenoiseRequest, model: DenoiserDescription) -> None:
    """Check a request against its model.

    Raises:
        UnsupportedError: a field is set that this release does not serve.
        InvalidRequestError: fields are out of range; every one is named.
    """
    refuse_unserved(request, _UNSERVED, request.model)
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)


def _violations(request: pb.DenoiseRequest, model: DenoiserDescription) -> Iterator[FieldViolation]:
    yield from check_seed("seed", request.seed)
    yield from check_range("sampling.steps", request.sampling.steps, 0, model.max_steps)
    yield from _shape_violations(list(request.latent_shape), model)
    if not request.conditioning.tensors:
        yield FieldViolation("conditioning", "has no tensors; run the encoder first")
    if request.guidance.scale > 1 and not request.negative_conditioning.tensors:
        yield FieldViolation("negative_conditioning", "is needed for a guidance scale above 1; encode the empty prompt")


def _shape_violations(shape: list[int], model: DenoiserDescription) -> Iterator[FieldViolation]:
    if len(shape) != 3 or shape[0] != model.latent_channels or min(shape) < _MIN_EXTENT:
        yield FieldViolation("latent_shape", f"is {shape}; must be [{model.latent_channels}, height, width]")
    elif shape[1] * shape[2] > model.max_latent_area:
        yield FieldViolation(
            "latent_shape", f"{shape[1]}x{shape[2]} is more than the {model.max_latent_area} elements allowed"
        )
