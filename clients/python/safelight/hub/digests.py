"""Digests of files, as the hubs tell them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 2**20


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file's bytes have the digest: "sha256:…", or "git:…", the SHA-1 of the file as a git blob."""
    algorithm, _, expected = digest.partition(":")
    hashed = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hashed.update(block)
    return hashed.hexdigest() == expected.lower()
