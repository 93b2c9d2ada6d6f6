"""How long a film is: what a request may ask for, and what it gets. A model that makes pictures has no frames. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from safelight.errors import FieldViolation
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import TensorRef
from services.common.film_limits import check_film_side, check_fps


def frame_count(request: GenerateRequest, model: ModelDescription) -> int:
    """Frames of the film that a request gets; 0 for a picture."""
    if not model.denoiser.default_latent_frames:
        return 0
    return request.num_frames or _frames(model.denoiser.default_latent_frames, model)


def latent_frames(frames: int, model: ModelDescription) -> tuple[int, ...]:
    """The axis of time of a latent: none for a picture."""
    return (1 + (frames - 1) // model.decoder.frames_per_latent,) if frames else ()


def whole_frames(frames: int, model: ModelDescription) -> int:
    """Frames of the longest film that a model makes of at most so many."""
    return frames - (frames - 1) % model.decoder.frames_per_latent


def decoder_steps(latents: TensorRef) -> int:
    """The decoder's steps for a latent [1, C, T, H, W], one a latent frame, or for that of a picture, [1, C, H, W]."""
    shape = latents.header.shape
    return shape[2] if len(shape) == 5 else 1


def film_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    """What is wrong with the length and the speed of a film that a model is asked for, which makes films.

    How long it may be follows its size; where its inputs are yet to say that, any length is right.
    """
    yield from check_fps("fps", request.fps)
    yield from check_film_side("width", request.width)
    yield from check_film_side("height", request.height)
    frames, per_latent = request.num_frames, model.decoder.frames_per_latent
    if _has_size(request) and frames > (most := most_frames(request, model)):
        yield FieldViolation("num_frames", f"is {frames}; a film of this size may have {most}: shorten it or shrink it")
    elif frames < 0 or (frames and (frames - 1) % per_latent):
        nearest = max(1 + round((frames - 1) / per_latent) * per_latent, 1)
        yield FieldViolation(
            "num_frames", f"is {frames}; must be one more than a multiple of {per_latent}: try {nearest}"
        )


def _has_size(request: GenerateRequest) -> bool:
    return not request.inputs or (request.width > 0 and request.height > 0)


def most_frames(request: GenerateRequest, model: ModelDescription) -> int:
    """Frames of the longest film of the request's size."""
    denoiser, factor = model.denoiser, model.decoder.scale_factor
    width = request.width // factor or denoiser.default_latent_width
    height = request.height // factor or denoiser.default_latent_height
    return _frames(max(denoiser.max_latent_volume // (width * height), 1), model)


def _frames(count: int, model: ModelDescription) -> int:
    """Frames of a film of so many latent frames."""
    return 1 + (count - 1) * model.decoder.frames_per_latent
