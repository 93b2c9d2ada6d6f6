"""Picture files that users upload: opened and measured without decoding their pixels. PNG, JPEG and WebP by Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile


class PictureError(ValueError):
    """A picture file that cannot be read or written as asked; the message is a sentence for the person who asked."""


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """What an uploaded picture may hold; checked before any of its pixels are decoded."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64 * 2**20


DEFAULT_LIMITS = PictureLimits()


@dataclass(frozen=True)
class OpenPicture:
    """A picture file whose pixels are not yet decoded.

    Args:
        image: as it is stored.
        turn: what turns it upright as its EXIF says; None: it is.
    """

    image: ImageFile
    turn: Image.Transpose | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        width, height = self.image.size
        return (height, width) if self.turn in _ON_ITS_SIDE else (width, height)

    def upright(self, pixels: Image.Image) -> Image.Image:
        """Pixels of the file's own orientation, turned."""
        return pixels if self.turn is None else pixels.transpose(self.turn)


@contextmanager
def opened_picture(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> Iterator[OpenPicture]:
    """A PNG, JPEG or WebP file, open for as long as the context lasts.

    Raises PictureError if the file is over the limits, broken, or of another format; also for what Pillow raises while
    the context lasts.
    """
    if len(data) > limits.max_bytes:
        raise PictureError(f"the picture file has {len(data)} bytes and may have {limits.max_bytes}: make it smaller")
    with reading("picture"):
        with quietly():
            image = open_file(data)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
        width, height = image.size
        if width * height > limits.max_pixels:
            raise PictureError(
                f"the picture has {width}x{height} pixels and may have {limits.max_pixels}: make it smaller"
            )
        yield OpenPicture(image, _UPRIGHT.get(orientation))


def picture_size(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height in pixels of a picture file, upright.

    Raises PictureError if the file is over the limits, of another format, or broken as far as its header tells.
    """
    with opened_picture(data, limits) as picture:
        return picture.size


# The readers themselves instead of Image.open: that warns or raises at a pixel limit of its own, global to the process.
_READERS: Mapping[bytes, Callable[[io.BytesIO], ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}

_QUIET = Lock()

_UPRIGHT = {  # value of the EXIF tag Orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}

_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_file(data: bytes) -> ImageFile:
    """Raises PictureError for another format, and whatever Pillow raises for a broken file."""
    for signature, reader in _READERS.items():
        if data.startswith(signature):
            return reader(io.BytesIO(data))
    raise PictureError("a picture file must be PNG, JPEG or WebP")


@contextmanager
def quietly() -> Iterator[None]:
    """Mutes what Pillow warns of, which is damaged EXIF; one at a time, because all threads share the filters."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever Pillow raises on a broken file into a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except _PILLOW_ERRORS as error:
        raise PictureError(f"the {what} cannot be read: {error}") from error
