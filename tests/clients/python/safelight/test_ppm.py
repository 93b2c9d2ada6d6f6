from __future__ import annotations

import io

import pytest
from PIL import Image

from safelight.ppm import read_ppm


def stream(*pictures: Image.Image) -> bytes:
    file = io.BytesIO()
    for picture in pictures:
        picture.save(file, "PPM")
    return file.getvalue()


PICTURES = [Image.effect_noise((5, 3), 90).convert("RGB"), Image.new("RGB", (2, 7), (10, 13, 32))]


def test_pictures_come_one_after_the_other_until_there_are_no_more() -> None:
    source = io.BytesIO(stream(*PICTURES))
    for picture in PICTURES:
        read = read_ppm(source)
        assert read is not None
        assert (read.size, read.tobytes()) == (picture.size, picture.tobytes())
    assert read_ppm(source) is None


@pytest.mark.parametrize("size", [1, 5, 9, 12, 50])
def test_a_picture_that_ends_early_is_none(size: int) -> None:
    assert read_ppm(io.BytesIO(stream(PICTURES[0])[:size])) is None
