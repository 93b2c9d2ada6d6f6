"""Masks: white is repainted and black is kept, to the pixel, whatever the mask's size, mode and turn."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image

from services.common.picture_files import PictureError, PictureLimits
from services.common.picture_pixels import read_mask
from services.decoder.masks import composite, latent_mask

LEFT_HALF = np.repeat([[255] * 32 + [0] * 32], 40, axis=0).astype(np.uint8)


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def random_pixels(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (40, 64, 3), np.uint8)


def test_a_wide_mask_masks_a_wide_latent() -> None:
    expected = np.repeat([[1.0] * 4 + [0.0] * 4], 5, axis=0)
    np.testing.assert_array_equal(latent_mask(LEFT_HALF, 8)[0, 0].numpy(), expected)


def test_an_element_with_a_white_pixel_is_repainted() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[3, 21] = 128
    assert latent_mask(mask, 8)[0, 0].tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(("level", "value"), [(0, 0.0), (127, 0.0), (128, 1.0), (255, 1.0)])
def test_a_mask_of_one_level_repaints_all_or_nothing(level: int, value: float) -> None:
    assert set(latent_mask(np.full((16, 16), level, np.uint8), 8).flatten().tolist()) == {value}


@given(st.integers(0, 2**32 - 1))
def test_black_keeps_the_original_bit_for_bit_and_white_the_new_picture(seed: int) -> None:
    mask = np.random.default_rng(seed).choice(np.array([0, 90, 255], np.uint8), (40, 64))
    new, old = random_pixels(1), random_pixels(2)
    result = composite(new, old, mask)
    np.testing.assert_array_equal(result[mask == 0], old[mask == 0])
    np.testing.assert_array_equal(result[mask == 255], new[mask == 255])
    blended = new[mask == 90] * (90 / 255) + old[mask == 90] * (165 / 255)
    assert np.abs(result[mask == 90] - blended).max() <= 0.5


MODES = {
    "L": Image.fromarray(LEFT_HALF),
    "1": Image.fromarray(LEFT_HALF).convert("1"),
    "RGB": Image.fromarray(LEFT_HALF).convert("RGB"),
    "P": Image.fromarray(LEFT_HALF).convert("P"),
    "16 bits": Image.fromarray(LEFT_HALF.astype(np.uint16) * 257),
    "white strokes on nothing": Image.merge("LA", [Image.new("L", (64, 40), 255), Image.fromarray(LEFT_HALF)]),
    "white beside transparent white": Image.merge(
        "RGBA", [Image.new("L", (64, 40), 255)] * 3 + [Image.fromarray(LEFT_HALF)]
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_every_mode_say_the_same(mode: str) -> None:
    np.testing.assert_array_equal(read_mask(png(MODES[mode]), (64, 40)), LEFT_HALF)


@pytest.mark.parametrize("size", [(2, 1), (16, 10), (64, 40), (128, 80), (640, 400), (10, 400)])
def test_a_mask_of_any_size_and_aspect_is_stretched_to_the_picture(size: tuple[int, int]) -> None:
    mask = Image.fromarray(LEFT_HALF).resize(size, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(read_mask(png(mask), (64, 40)), LEFT_HALF)


def test_a_mask_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sideways = Image.fromarray(LEFT_HALF).transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(read_mask(png(sideways, exif=exif), (64, 40)), LEFT_HALF)


def test_a_mask_over_the_limits_is_refused() -> None:
    with pytest.raises(PictureError, match="64x40 pixels"):
        read_mask(png(Image.fromarray(LEFT_HALF)), (64, 40), PictureLimits(max_pixels=64 * 39))
