"""What a decode or encode request must be. Pure: messages and descriptions in, errors out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safelight.errors import FieldViolation, InvalidRequestError, UnsupportedError
from safelight.v1.decoder_service_pb2 import DecodeRequest, EncodeFilmRequest, EncodeImageRequest
from safelight.v1.model_pb2 import DecoderDescription
from safelight.v1.work_pb2 import OUTPUT_FORMAT_UNSPECIFIED, OutputFormat
from services.common.film_limits import check_film_side, check_fps
from services.common.validation import check_range


@dataclass(frozen=True, kw_only=True)
class FilmLimits:
    """What a film that is encoded may hold; max_frame_pixels bounds the frames of its file and of its latents alike."""

    max_bytes: int
    max_frames: int
    max_frame_pixels: int


def check_decode(request: DecodeRequest, model: DecoderDescription) -> None:
    """Check a decode request against its model.

    Raises:
        InvalidRequestError: fields are out of range; every one is named.
    """
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)


def check_picture_size(width: int, height: int, model: DecoderDescription) -> None:
    """Raises InvalidRequestError unless a picture's sides are multiples of the model's scale factor."""
    factor = model.scale_factor
    if width % factor or height % factor:
        raise InvalidRequestError.of(
            "image", f"has {width}x{height} pixels; both must be multiples of {factor}: crop or resize it"
        )


def check_encode_image(request: EncodeImageRequest, model: DecoderDescription, max_pixels: int) -> None:
    """Check the size that a picture is to be scaled to; 0 by 0 is its own, which only its file tells.

    Raises:
        UnsupportedError: the model makes films.
        InvalidRequestError: it does not fit the model, or has more pixels than a picture may have.
    """
    if model.frames_per_latent:
        raise UnsupportedError(f"image: model {request.model!r} makes films; it takes no picture here", field="image")
    width, height, factor = request.width, request.height, model.scale_factor
    if width == height == 0:
        return
    if min(width, height) < 1 or width % factor or height % factor or width * height > max_pixels:
        raise InvalidRequestError.of(
            "width",
            f"{width}x{height} must be multiples of {factor} and at most {max_pixels} pixels; or leave both out",
        )


def check_encode_film(request: EncodeFilmRequest, model: DecoderDescription, limits: FilmLimits) -> None:
    """Check what is to be encoded, its size and its length.

    Raises:
        UnsupportedError: the model makes pictures.
        InvalidRequestError: fields are out of range; every one is named.
    """
    if not model.frames_per_latent:
        raise UnsupportedError(f"film: model {request.model!r} makes pictures; it takes no film", field="film")
    if violations := [*_film_violations(request, limits), *_frame_violations(request, model, limits)]:
        raise InvalidRequestError.of_all(violations)


def _film_violations(request: EncodeFilmRequest, limits: FilmLimits) -> Iterator[FieldViolation]:
    if bool(request.film) == bool(request.keyframes):
        yield FieldViolation("film", "must be given, or keyframes in its place, and not both")
    if len(request.film) > limits.max_bytes:
        yield FieldViolation("film", f"has {len(request.film)} bytes and may have {limits.max_bytes}: make it smaller")
    if request.num_frames > 0:
        yield from check_range("keyframes", len(request.keyframes), 0, request.num_frames)


def _frame_violations(
    request: EncodeFilmRequest, model: DecoderDescription, limits: FilmLimits
) -> Iterator[FieldViolation]:
    factor, per_latent = model.scale_factor, model.frames_per_latent
    width, height, frames = request.width, request.height, request.num_frames
    if min(width, height) < 1 or width % factor or height % factor or width * height > limits.max_frame_pixels:
        yield FieldViolation(
            "width",
            f"{width}x{height} must be multiples of {factor}, above 0, and at most {limits.max_frame_pixels} pixels",
        )
    if not 1 <= frames <= limits.max_frames or (frames - 1) % per_latent:
        yield FieldViolation(
            "num_frames", f"is {frames}; must be one more than a multiple of {per_latent}, at most {limits.max_frames}"
        )


def _violations(request: DecodeRequest, model: DecoderDescription) -> Iterator[FieldViolation]:
    shape = list(request.latents.header.shape)
    axes = ["frames", "height", "width"] if model.frames_per_latent else ["height", "width"]
    if len(shape) != 2 + len(axes) or shape[:2] != [1, model.latent_channels] or min(shape) < 1:
        expected = ", ".join(["1", str(model.latent_channels), *axes])
        yield FieldViolation("latents", f"has shape {shape}; must be [{expected}]")
    elif model.frames_per_latent:
        yield from check_fps("parameters.fps", request.parameters.fps)
        for side in shape[-2:]:
            yield from check_film_side("latents", side * model.scale_factor)
    yield from check_range("output.quality", request.output.quality, 0, 100)
    if request.output.format not in (OUTPUT_FORMAT_UNSPECIFIED, *model.formats):
        known = ", ".join(OutputFormat.Name(known) for known in model.formats)
        yield FieldViolation("output.format", f"is {request.output.format}; choose from {known}")
    if bool(request.mask) != bool(request.original_image):
        missing = "original_image" if request.mask else "mask"
        yield FieldViolation(missing, "is missing: original_image and mask go together")
