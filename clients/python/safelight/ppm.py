"""Binary PPM, the plainest picture file: the form in which frames come from ffmpeg."""

from __future__ import annotations

from typing import IO

from PIL import Image


def read_ppm(stream: IO[bytes]) -> Image.Image | None:
    """The next picture of a stream, RGB with 8 bits: lines "P6", size and largest level, then levels.

    None: the stream has ended, before the picture or within it.
    """
    _, size, depth = (stream.readline() for _ in range(3))
    if not depth:
        return None
    width, height = map(int, size.split())
    levels = stream.read(3 * width * height)
    return Image.frombytes("RGB", (width, height), levels) if len(levels) == 3 * width * height else None
