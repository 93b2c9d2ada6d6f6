"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_byte_size(size: int | str) -> int:
    """Bytes of a number of them, or of a text such as "12GiB", "500 MB" or "1.5TiB".

    Raises:
        ValueError: it is neither, or below 0.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"{size!r} is no size of memory")
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{size!r} is no size of memory")
    return int(float(match[1]) * _UNITS[match[2].lower()])
