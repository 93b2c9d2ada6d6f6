"""Loads the models of a manifest into a stage, each by its family's loader."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
from services.modeling.components import detect_family

_log = logging.getLogger("safelight.loading")

Model = TypeVar("Model")
Loader = Callable[[ModelEntry, torch.device], Model]


def load_models(
    entries: Sequence[ModelEntry], loaders: Mapping[str, Loader[Model]], device: torch.device
) -> dict[str, Model]:
    """Every model of the manifest, by name.

    Raises:
        CheckpointError: weights are missing, damaged, or of a family that this stage has no loader for.
    """
    return {entry.name: _load(entry, loaders, device) for entry in entries}


def _load(entry: ModelEntry, loaders: Mapping[str, Loader[Model]], device: torch.device) -> Model:
    family = detect_family(entry)
    if family not in loaders:
        raise CheckpointError(f"model {entry.name!r}: family {family!r} is not one of {', '.join(loaders)}")
    started = time.monotonic()
    model = loaders[family](entry, device)
    _log.info("model loaded", extra={"model": entry.name, "seconds": round(time.monotonic() - started, 3)})
    return model
