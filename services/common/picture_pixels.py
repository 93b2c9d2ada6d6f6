"""The pixels of picture files that users upload: upright, at the size that is needed. PNG, JPEG and WebP by Pillow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.common.picture_files import DEFAULT_LIMITS, PictureLimits, opened_picture


def read_pixels(
    data: bytes, limits: PictureLimits = DEFAULT_LIMITS, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """A PNG, JPEG or WebP file as levels [H, W, 3]: upright by its EXIF, transparency on white.

    size: width and height that it is stretched to (Lanczos); None: its own.

    Raises PictureError if the file is over the limits, broken, or of another format.
    """
    with opened_picture(data, limits) as picture:
        image = picture.upright(_on(_eight_bit(picture.image), "white"))
        if size is not None and image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return np.array(image)


def read_mask(data: bytes, size: tuple[int, int], limits: PictureLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """A mask's file as its brightness [H, W], 255 where to repaint: upright by its EXIF, transparency on black.

    size: width and height that it is stretched to, each pixel the mean of those that it covers.

    Raises PictureError as `read_pixels` does.
    """
    with opened_picture(data, limits) as picture:
        mask = picture.upright(_on(_eight_bit(picture.image), "black").convert("L"))
        return np.array(mask.resize(size, Image.Resampling.BOX))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit greys, which Pillow would clip at 255, scaled to 8 bits."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))


def _on(image: Image.Image, background: str) -> Image.Image:
    """Any mode as RGB, with transparent parts blended onto a background."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
