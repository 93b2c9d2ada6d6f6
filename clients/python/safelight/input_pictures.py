"""The pictures that a request starts from: from what the user has to the file that is sent."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from safelight.errors import InvalidRequestError

InputPicture = Image.Image | bytes | str | os.PathLike[str]
"""A picture in memory, a picture file's bytes, or its path."""

MAX_FILE_BYTES = 3 * 1024 * 1024
"""Largest file that is sent."""

_WANTED = "a PIL picture, a picture file's bytes, or its path"
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def picture_files(field: str, pictures: InputPicture | Sequence[InputPicture] | None) -> list[bytes]:
    """The files of one picture, of several, or of none; arguments and errors as `picture_file`'s."""
    if pictures is None:
        return []
    if not isinstance(pictures, Sequence) or isinstance(pictures, (bytes, str)):
        return [picture_file(field, pictures)]
    return [picture_file(f"{field}[{index}]", picture) for index, picture in enumerate(pictures)]


def picture_file(field: str, picture: InputPicture) -> bytes:
    """The file that is sent: a file as it is (its EXIF turns it there), a picture in memory as a PNG of its pixels.

    Args:
        field: that names the picture, for errors.
        picture: what the user gave.

    Raises:
        InvalidRequestError: it is no picture, can't be read, or its file is too large.
    """
    data = _png(field, picture) if isinstance(picture, Image.Image) else input_file(field, picture, _WANTED)
    if len(data) > MAX_FILE_BYTES:
        what = f"{picture.width}x{picture.height} pixels, as PNG" if isinstance(picture, Image.Image) else "a file of"
        raise InvalidRequestError.of(
            field,
            f"is {what} {len(data)} bytes; at most {MAX_FILE_BYTES} can be sent: resize it, or save it as JPEG or WebP",
        )
    return data


def input_file(field: str, picture: bytes | str | os.PathLike[str], wanted: str) -> bytes:
    """The bytes of a file that the user named, or gave; wanted: what to give, for the error.

    Raises:
        InvalidRequestError: it is neither, or can't be read.
    """
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, (str, os.PathLike)):
        raise InvalidRequestError.of(field, f"is a {type(picture).__name__}; give {wanted}")
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(field, f"{picture} can't be read: {error.strerror}") from error


def _png(field: str, picture: Image.Image) -> bytes:
    file = io.BytesIO()
    try:
        (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(file, "PNG")
    except (OSError, ValueError) as error:
        raise InvalidRequestError.of(field, f"can't be read: {error}") from error
    return file.getvalue()
