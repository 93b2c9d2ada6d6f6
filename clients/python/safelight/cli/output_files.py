"""The files that the commands write: checked before the work starts, and never left half written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safelight.errors import InvalidRequestError

FORMATS = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".mp4": "mp4",
    ".webm": "webm",
    ".gif": "gif",
    ".zip": "png_frames",
    ".safetensors": "latents",
}
"""The format that a file's suffix asks for."""


def format_of(output: Path) -> str:
    """The format of an output file.

    Raises:
        InvalidRequestError: its suffix stands for none.
    """
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        raise InvalidRequestError.of("--output", f"{output} ends in {suffix!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[suffix]


def output_paths(option: str, output: Path, count: int) -> list[Path]:
    """The file of each picture: cat.png, or cat-0.png, cat-1.png … of several.

    Args:
        option: that named the file, for errors.
        output: the file.
        count: of the pictures.

    Raises:
        InvalidRequestError: one can't be written.
    """
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(count)]
    for path in paths:
        _check_writable(option, path)
    return paths


def _check_writable(option: str, path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InvalidRequestError.of(option, f"{path} is not a file; give the path of one")
    if path.exists() and not os.access(path, os.W_OK):
        raise InvalidRequestError.of(option, f"{path} may not be written; make it writable, or give another path")
    try:
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise InvalidRequestError.of(option, f"{path} can't be written: {error.strerror}") from error


def write_files(paths: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Write each file under another name and rename it when it is whole.

    Raises:
        OSError: the disk is full, or the like; the file is not there then.
    """
    for path, content in zip(paths, contents, strict=True):
        temporary = _temporary(path)
        try:
            temporary.write_bytes(content)
            temporary.replace(path.resolve())
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Where a file is written first: beside its end, where links lead to."""
    target = path.resolve()
    return target.with_name(f".{target.name}.{os.getpid()}.part")
