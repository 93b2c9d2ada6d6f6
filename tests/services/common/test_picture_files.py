"""What the header of an uploaded picture tells."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageOps

from services.common.picture_files import PictureError, PictureLimits, picture_size

FORMATS = ["PNG", "JPEG", "WEBP"]


def file_of(file_format: str, size: tuple[int, int] = (64, 40), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_size_is_that_of_the_upright_picture(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file_of(file_format, exif=exif)
    assert picture_size(data) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_over_the_limits_is_refused(file_format: str) -> None:
    data = file_of(file_format)
    assert picture_size(data, PictureLimits(max_bytes=len(data), max_pixels=64 * 40)) == (64, 40)
    with pytest.raises(PictureError, match=f"{len(data)} bytes"):
        picture_size(data, PictureLimits(max_bytes=len(data) - 1))
    with pytest.raises(PictureError, match="64x40 pixels"):
        picture_size(data, PictureLimits(max_pixels=64 * 40 - 1))


def test_the_pixels_are_not_decoded() -> None:
    data = file_of("PNG", (3000, 3000))
    assert picture_size(data[: len(data) // 2]) == (3000, 3000)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"not a picture"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(PictureError):
        picture_size(data)
