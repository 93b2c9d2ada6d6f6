"""Loads the models of a manifest into a stage, each by its family's loader."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from safelight.errors import CheckpointError
from services.common.hub_sources import fetch_sources
from services.common.manifest import ModelEntry
from services.modeling.components import detect_family, resolve_device
from services.modeling.usual_networks import with_usual_networks

_log = logging.getLogger("safelight.loading")

Model = TypeVar("Model")
Loader = Callable[[ModelEntry, torch.device], Model]


def load_stage(
    stage: str,
    entries: Sequence[ModelEntry],
    loaders: Mapping[str, Loader[Model]],
    device: torch.device,
    *,
    from_hub: bool,
) -> dict[str, Model]:
    """A stage's part of every model of the manifest, by name; what is not on this machine is fetched first.

    Args:
        stage: "encoder", "denoiser" or "decoder".
        entries: of the manifest.
        loaders: by family.
        device: of the models whose entry names none for the stage.
        from_hub: whether the hubs may be asked; otherwise everything must be here.

    Raises:
        CheckpointError: weights are missing, damaged, of a family that this stage has no loader for, or can't be
            fetched.
    """
    models: dict[str, Model] = {}
    for entry in entries:
        located = _locate(entry, stage, from_hub=from_hub)
        named = located.component(stage).device
        models |= load_models([located], loaders, resolve_device(named) if named else device)
    return models


def _locate(entry: ModelEntry, stage: str, *, from_hub: bool) -> ModelEntry:
    """The entry with paths on this machine for all that the stage reads of it."""
    fetched = fetch_sources(entry, stage, from_hub=from_hub)
    return with_usual_networks(fetched, detect_family(fetched), stage, from_hub=from_hub)


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
