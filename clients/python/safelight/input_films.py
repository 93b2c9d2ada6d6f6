"""The film that a request starts from: from what the user has to the file that is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image

from safelight.errors import InvalidRequestError
from safelight.input_pictures import input_file
from safelight.video import lossless_film

InputFilm = Sequence[Image.Image] | bytes | str | os.PathLike[str]
"""Frames in memory (a list, or a VideoReader), a film file's bytes, or its path."""

MAX_FILM_BYTES = 64 * 1024 * 1024
"""Largest film that is sent."""

DEFAULT_FPS = 16.0
"""Of frames that come without."""


def film_file(field: str, film: InputFilm, fps: float | None = None) -> bytes:
    """The file that is sent: a file as it is, frames as a lossless film of their pixels.

    Args:
        field: that names the film, for errors.
        film: what the user gave.
        fps: of frames; None: 16.

    Raises:
        InvalidRequestError: it is no film, can't be read, or its file is too large.
        UnsupportedError: it is frames, and there is no ffmpeg.
    """
    if isinstance(film, Sequence) and not isinstance(film, (bytes, str)):
        data, what = lossless_film(field, film, fps or DEFAULT_FPS), f"{len(film)} frames, losslessly,"
    else:
        data, what = input_file(field, film, "PIL pictures, a film file's bytes, or its path"), "a file"
    if len(data) > MAX_FILM_BYTES:
        raise InvalidRequestError.of(
            field, f"is {what} of {len(data)} bytes; at most {MAX_FILM_BYTES} can be sent: shorten or resize it"
        )
    return data
