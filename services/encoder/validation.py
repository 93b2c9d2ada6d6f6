"""What an encode request must be. Pure: messages and descriptions in, errors out."""

from __future__ import annotations

from collections.abc import Iterator

from safelight.errors import FieldViolation, InvalidRequestError, UnsupportedError
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.model_pb2 import EncoderDescription
from services.common.validation import check_adapters, check_determinism, check_range

MAX_PROMPTS = 64


def check_encode(request: EncodeRequest, model: EncoderDescription) -> None:
    """Check a request against its model.

    Raises:
        UnsupportedError: it has inputs beside text.
        InvalidRequestError: fields are out of range; every one is named.
    """
    if request.inputs:
        raise UnsupportedError("inputs: this model takes text only; leave them out", field="inputs")
    if violations := list(_violations(request, model)):
        raise InvalidRequestError.of_all(violations)


def _violations(request: EncodeRequest, model: EncoderDescription) -> Iterator[FieldViolation]:
    yield from check_range("prompts", len(request.prompts), 1, MAX_PROMPTS)
    yield from check_range("negative_prompts", request.negative_prompts, 0, len(request.prompts))
    yield from check_range("clip_skip", request.clip_skip, 0, model.max_clip_skip)
    yield from check_determinism(request.determinism)
    yield from check_adapters(request.adapters)
    for index, prompt in enumerate(request.prompts):
        size = len(prompt.encode())
        if size > model.max_prompt_bytes:
            yield FieldViolation(f"prompts[{index}]", f"has {size} bytes; must have at most {model.max_prompt_bytes}")
