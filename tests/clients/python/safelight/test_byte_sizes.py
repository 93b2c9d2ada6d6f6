"""Laws of sizes of memory: what people write is read, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from safelight.byte_sizes import parse_byte_size


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("500MB", 500 * 10**6),
        (" 1.5TiB ", 3 * 2**39),
        ("2KiB", 2048),
        ("7b", 7),
    ],
)
def test_a_size_is_a_number_with_or_without_a_unit(size: int | str, count: int) -> None:
    assert parse_byte_size(size) == count


@pytest.mark.parametrize("size", ["", "GiB", "12 apples", "-1", -1, "1e9", "nan", 1.5, True, None, [1]])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="is no size of memory"):
        parse_byte_size(size)
