"""Draws the training pictures: every single-codepoint emoji of Noto Color Emoji, on white.

The font stores bitmaps (CBDT) of one size only, 136x128 pixels at 109 ppem, so each glyph is drawn at that size on a
square canvas and then brought to the training resolution.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE_SIZE = 109
CANVAS_SIZE = 144
PICTURE_SIZE = 128

FIRST_CODEPOINT, LAST_CODEPOINT = 0x203C, 0x1FAFF

# Bitmaps that are not pictures of a thing: nobody asks for them in words, and each would cost the small model capacity.
EXCLUDED_RANGES = (
    (0x2122, 0x21AA),  # trade mark, information, arrows
    (0x23CF, 0x23EF),  # eject, fast forward and the other media buttons
    (0x23F8, 0x25FE),  # pause, stop, circled M, small squares and triangles
    (0x27A1, 0x27BF),  # arrow, loops
    (0x2934, 0x2B1C),  # arrows, squares
    (0x3030, 0x3299),  # wavy dash, circled ideographs
    (0x1F170, 0x1F251),  # squared letters, halves of flags, squared ideographs
    (0x1F3FB, 0x1F3FF),  # skin tones
    (0x1F500, 0x1F506),  # shuffle, repeat, brightness
    (0x1F518, 0x1F524),  # radio button, "back", "soon", input modes
    (0x1F530, 0x1F53D),  # beginner's mark, buttons, diamonds, triangles
    (0x1F55C, 0x1F567),  # clock faces at half past, next to the twelve full hours
    (0x1F6C2, 0x1F6C5),  # passport control, customs, baggage, luggage
    (0x1F9B0, 0x1F9B3),  # hair styles
)


@dataclass(frozen=True)
class Glyph:
    """One emoji: its codepoint, its Unicode name and its picture as (128, 128, 3) bytes."""

    codepoint: int
    name: str
    pixels: NDArray[np.uint8]


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Returns the centred colour bitmap of `character`, or None where the font has none."""
    left, top, right, bottom = font.getbbox(character)
    if right - left <= 0 or bottom - top <= 0:
        return None
    canvas = Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), "white")
    position = ((CANVAS_SIZE - right - left) / 2, (CANVAS_SIZE - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(position, character, font=font, embedded_color=True)
    return None if min(canvas.convert("L").tobytes()) == 255 else canvas


def _is_excluded(codepoint: int) -> bool:
    return any(first <= codepoint <= last for first, last in EXCLUDED_RANGES)


def load_glyphs(font_path: Path = FONT_PATH) -> list[Glyph]:
    """Draws every usable emoji of the font, in codepoint order."""
    font = ImageFont.truetype(str(font_path), STRIKE_SIZE)
    missing = _draw(font, "\U000e0fff")
    missing_bytes = missing.tobytes() if missing else b""
    glyphs = []
    for codepoint in range(FIRST_CODEPOINT, LAST_CODEPOINT + 1):
        name = unicodedata.name(chr(codepoint), "")
        if not name or _is_excluded(codepoint):
            continue
        canvas = _draw(font, chr(codepoint))
        if canvas is None or canvas.tobytes() == missing_bytes:
            continue
        picture = canvas.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
        glyphs.append(Glyph(codepoint, name, np.asarray(picture, dtype=np.uint8)))
    return glyphs


def to_tensor(glyphs: list[Glyph]) -> torch.Tensor:
    """Stacks the pictures as (N, 3, 128, 128) float32 in [-1, 1], the range Stable Diffusion's VAE works in."""
    stacked = torch.from_numpy(np.stack([glyph.pixels for glyph in glyphs]))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
