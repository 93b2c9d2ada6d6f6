"""Checks that more than one service makes; each yields what is wrong with a field, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from safelight.errors import FieldViolation

MAX_SEED = 2**63 - 1


def check_range(field: str, value: float, low: float, high: float) -> Iterator[FieldViolation]:
    """A finite number in [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        yield FieldViolation(field, f"is {value:g}; must be from {low:g} to {high:g}")


def check_seed(field: str, seed: int) -> Iterator[FieldViolation]:
    """A seed that every random generator takes."""
    if seed < 0:
        yield FieldViolation(field, f"is {seed}; must be from 0 to {MAX_SEED}, or left out to have one drawn")
