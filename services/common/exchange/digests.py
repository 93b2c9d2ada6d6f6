"""The digest of a tensor's bytes: XXH3-64, big-endian."""

from __future__ import annotations

import xxhash


def digest(data: memoryview | bytes) -> bytes:
    """XXH3-64 of the bytes, big-endian."""
    return xxhash.xxh3_64_digest(data)


def running_digest() -> xxhash.xxh3_64:
    """The same digest of bytes that arrive in pieces: `update` with each, in order, then `digest`."""
    return xxhash.xxh3_64()
