"""The pictures of an encode request: read at the size of the film that they are for; an error names the picture."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safelight.errors import InvalidRequestError
from safelight.v1.encoder_service_pb2 import EncodeRequest
from services.common.picture_files import PictureError
from services.common.picture_pixels import read_pixels


class PictureKey(NamedTuple):
    """What the embedding of a picture depends on; `model` names the weights by their fingerprint.

    `alone` marks one that was encoded by itself: the batch changes the rounding.
    """

    model: str
    sha256: bytes
    size: tuple[int, int]
    alone: bool


def picture_key(request: EncodeRequest, index: int, fingerprint: str, alone: bool) -> PictureKey:
    """The key of one of the request's pictures."""
    digest = hashlib.sha256(request.inputs[index].data).digest()
    return PictureKey(fingerprint, digest, (request.width, request.height), alone)


def read_input(request: EncodeRequest, index: int) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of one of the request's pictures, stretched to the film's size (Lanczos) if it is said.

    Raises:
        InvalidRequestError: the file can't be read.
    """
    try:
        size = (request.width, request.height) if request.width else None
        return read_pixels(request.inputs[index].data, size=size)
    except PictureError as error:
        raise InvalidRequestError.of(f"inputs[{index}].data", str(error)) from error
