"""The weights that a user names: checked here, where the error can name the user's own field."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.errors import InvalidRequestError

PathLike = str | os.PathLike[str]
WeightsPath = PathLike | Sequence[PathLike]
"""A safetensors file, several that make one checkpoint, or a folder in the diffusers layout."""

DEMO_MODEL = "demo"
"""Name of the model that comes with Safelight; the embedded stack serves it when it is given none."""


def as_list(field: str, path: WeightsPath) -> list[str]:
    """The paths as texts.

    Raises:
        InvalidRequestError: there is none.
    """
    paths = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(each) for each in path]
    if not all(paths) or not paths:
        raise InvalidRequestError.of(field, "is empty; give a file or a folder")
    return paths


def existing_files(field: str, path: WeightsPath) -> list[str]:
    """The paths as texts.

    Raises:
        InvalidRequestError: there is none, or one does not exist.
    """
    paths = as_list(field, path)
    for each in paths:
        if not Path(each).exists():
            raise InvalidRequestError.of(field, f"{each} does not exist: correct the path")
    return paths


def entry_of(field: str, path: WeightsPath) -> dict[str, Any] | None:
    """The manifest's entry for a model; None for the demo model, named "demo" where there is no file of that name.

    Raises:
        InvalidRequestError: a path does not exist.
    """
    if path == DEMO_MODEL and not Path(DEMO_MODEL).exists():
        return None
    paths = existing_files(field, path)
    return {"name": model_name(paths[0]), "path": paths}


def model_name(path: str) -> str:
    """What a model is called by its path: the file's name without its suffix, or the folder's."""
    whole = Path(path).absolute()
    return whole.name if whole.is_dir() else whole.stem
