"""The digest of a tensor's bytes: XXH3-64, big-endian."""

from __future__ import annotations

import asyncio

import xxhash

_BYTES_ON_THE_LOOP = 1024 * 1024
"""Digests of so many bytes take some 50 microseconds; those of more are computed on a thread, without the GIL."""


def digest(data: memoryview | bytes) -> bytes:
    """XXH3-64 of the bytes, big-endian."""
    return xxhash.xxh3_64_digest(data)


def running_digest() -> xxhash.xxh3_64:
    """The same digest of bytes that arrive in pieces: `update` with each, in order, then `digest`."""
    return xxhash.xxh3_64()


async def digest_off_loop(data: memoryview) -> bytes:
    """The digest, without holding up the event loop."""
    if data.nbytes <= _BYTES_ON_THE_LOOP:
        return digest(data)
    return await asyncio.to_thread(digest, data)
