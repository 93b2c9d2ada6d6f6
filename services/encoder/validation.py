"""What an encode request must be. Pure: messages and descriptions in, errors out."""

from __future__ import annotations

from collections.abc import Iterator

from safelight.errors import FieldViolation, InvalidRequestError, UnsupportedError
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.model_pb2 import EncoderDescription
from safelight.v1.work_pb2 import MediaRole
from services.common.film_limits import MAX_SIDE_PIXELS
from services.common.validation import check_adapters, check_determinism, check_range

MAX_PROMPTS = 64
MAX_PICTURES = 64
_MAX_FILM_PIXELS = 16 * 1024**2  # of a frame


def check_encode(request: EncodeRequest, model: EncoderDescription) -> None:
    """Check a request against its model.

    Raises:
        UnsupportedError: it has inputs beside text that the model does not take.
        InvalidRequestError: fields are out of range; every one is named.
    """
    if any(given.role not in model.inputs for given in request.inputs):
        taken = ", ".join(map(MediaRole.Name, model.inputs)) or "text only"
        raise UnsupportedError(f"inputs: this model takes {taken}; leave the others out", field="inputs")
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)


def _violations(request: EncodeRequest, model: EncoderDescription) -> Iterator[FieldViolation]:
    yield from check_range("prompts", len(request.prompts), 1, MAX_PROMPTS)
    yield from check_range("negative_prompts", request.negative_prompts, 0, len(request.prompts))
    yield from check_range("clip_skip", request.clip_skip, 0, model.max_clip_skip)
    yield from check_determinism(request.determinism)
    yield from check_adapters(request.adapters)
    yield from check_range("inputs", len(request.inputs), 0, MAX_PICTURES)
    for field, pixels in (("width", request.width), ("height", request.height)):
        yield from check_range(field, pixels, 1 if request.width or request.height else 0, MAX_SIDE_PIXELS)
    if request.width * request.height > _MAX_FILM_PIXELS:
        yield FieldViolation("width", f"{request.width}x{request.height} has more than {_MAX_FILM_PIXELS} pixels")
    for index, prompt in enumerate(request.prompts):
        size = len(prompt.encode())
        if size > model.max_prompt_bytes:
            yield FieldViolation(f"prompts[{index}]", f"has {size} bytes; must have at most {model.max_prompt_bytes}")
