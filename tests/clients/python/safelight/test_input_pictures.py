"""What a user may give as a picture, and the file that is sent for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from safelight.errors import InvalidRequestError
from safelight.input_pictures import MAX_FILE_BYTES, picture_file
from safelight.messages import to_request
from safelight.options import GenerationOptions
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK

NOISE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)


def jpeg() -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(NOISE).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_a_file_is_sent_as_it_is_from_memory_and_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    assert picture_file("image", jpeg()) == picture_file("image", path) == picture_file("image", str(path)) == jpeg()


def test_a_picture_in_memory_is_sent_without_loss() -> None:
    sent = Image.open(io.BytesIO(picture_file("image", Image.fromarray(NOISE))))
    assert sent.format == "PNG"
    np.testing.assert_array_equal(np.asarray(sent), NOISE)


def test_an_open_file_is_a_picture_in_memory_its_pixels_as_they_are() -> None:
    sent = Image.open(io.BytesIO(picture_file("image", Image.open(io.BytesIO(jpeg())))))
    assert sent.size == (20, 30)
    assert not sent.getexif()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB",
                                  "I", "I;16", "F"])  # fmt: skip
def test_a_picture_of_every_mode_is_sent(mode: str) -> None:
    assert Image.open(io.BytesIO(picture_file("image", Image.new(mode, (3, 2))))).size == (3, 2)


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (7, "image: is a int; give a PIL picture, a picture file's bytes, or its path"),
        ("nowhere.png", "image: nowhere.png can't be read: No such file"),
        (b"x" * (MAX_FILE_BYTES + 1), r"image: is a file of 3145729 bytes; at most 3145728 can be sent: resize it"),
        (Image.effect_noise((2000, 2000), 100), r"image: is 2000x2000 pixels, as PNG \d+ bytes; .* resize it"),
    ],
)
def test_what_can_not_be_sent_is_refused(picture: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        picture_file("image", picture)


def test_a_request_carries_both_files_and_their_strength() -> None:
    request = to_request(GenerationOptions(prompt="a cat", image=jpeg(), mask=b"mask", strength=0.25))
    assert [(given.role, given.data) for given in request.inputs] == [
        (MEDIA_ROLE_IMAGE, jpeg()),
        (MEDIA_ROLE_MASK, b"mask"),
    ]
    assert request.strength == 0.25


def test_a_request_without_a_picture_has_no_strength() -> None:
    request = to_request(GenerationOptions(prompt="a cat"))
    assert not request.inputs
    assert not request.HasField("strength")
