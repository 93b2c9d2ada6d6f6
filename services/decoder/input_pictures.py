"""The pictures that a request brings, read at the size that is needed; an error names the field that brought them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1.model_pb2 import DecoderDescription
from services.common.picture_files import PictureError, PictureLimits
from services.common.picture_pixels import read_mask, read_pixels
from services.common.uploaded_films import FilmError
from services.decoder.images import read_picture
from services.decoder.masks import composite, latent_mask
from services.decoder.validation import check_picture_size


def read_input(
    request: pb.EncodeImageRequest, model: DecoderDescription, limits: PictureLimits
) -> tuple[Tensor, Tensor | None]:
    """The picture [1, 3, H, W] in [-1, 1], and its mask [1, 1, h, w] at the latent's size, if it has one.

    Raises:
        InvalidRequestError: a file can't be read, or the picture's own size does not fit the model.
    """
    with named("image"):
        image = read_picture(request.image, limits, (request.width, request.height) if request.width else None)
    height, width = image.shape[-2:]
    check_picture_size(width, height, model)
    if not request.mask:
        return image, None
    with named("mask"):
        return image, latent_mask(read_mask(request.mask, (width, height), limits), model.scale_factor)


def paste_original(pixels: NDArray[np.uint8], request: pb.DecodeRequest, limits: PictureLimits) -> NDArray[np.uint8]:
    """The picture [H, W, 3] with the original's pixels where the request's mask keeps them.

    Raises:
        InvalidRequestError: a file can't be read.
    """
    height, width = pixels.shape[:2]
    with named("original_image"):
        original = read_pixels(request.original_image, limits, (width, height))
    with named("mask"):
        return composite(pixels, original, read_mask(request.mask, (width, height), limits))


@contextmanager
def named(field: str) -> Iterator[None]:
    """Errors of a picture or film that is read meanwhile name the request's field that brought it."""
    try:
        yield
    except (PictureError, FilmError) as error:
        raise InvalidRequestError.of(field, str(error)) from error
