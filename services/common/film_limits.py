"""What a film's file can be, whatever model makes it; the gateway and the decoder check it alike. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from safelight.errors import FieldViolation

MIN_FPS, MAX_FPS = 1, 120
MAX_SIDE_PIXELS = 16_384  # H.264 goes no further


def check_fps(field: str, fps: float) -> Iterator[FieldViolation]:
    """Frames per second; 0 is the model's own."""
    if fps != 0 and not (math.isfinite(fps) and MIN_FPS <= fps <= MAX_FPS):
        yield FieldViolation(field, f"is {fps:g}; must be from {MIN_FPS} to {MAX_FPS}, or 0 for the model's own")


def check_film_side(field: str, pixels: int) -> Iterator[FieldViolation]:
    """Width or height."""
    if pixels > MAX_SIDE_PIXELS:
        yield FieldViolation(field, f"is {pixels} pixels; a film may have {MAX_SIDE_PIXELS} along a side: shrink it")
