"""From what a manifest names at a hub to files on this machine; a stage fetches only what it hosts."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from safelight.errors import DownloadError, InvalidRequestError
from safelight.hub import Snapshot, fetch_model, open_snapshot
from services.common.manifest import HubSource, ModelEntry, Part, WeightsPath
from services.common.weight_files import FOLDER_FILES, preferred_weights

_log = logging.getLogger("safelight.hub_sources")

_INDEX = "model_index.json"
# What each stage reads of a folder in the diffusers layout: whole folders, and single files of others.
_FOLDERS = {
    "encoder": ("text_encoder*", "tokenizer*", "image_encoder"),
    "denoiser": ("unet", "transformer*", "scheduler"),
    "decoder": ("vae",),
}
_FILES = {
    "encoder": (_INDEX,),
    "denoiser": (_INDEX, "latent_preview.json", "text_encoder*/config.json"),
    "decoder": (_INDEX,),
}
_SMALL_SUFFIXES = (".json", ".txt", ".model")

SomePart = TypeVar("SomePart", bound=Part)


def fetch_sources(entry: ModelEntry, stage: str, *, from_hub: bool) -> ModelEntry:
    """The entry with paths in place of the sources that a stage needs.

    The model's own source is not needed where the entry names the family and a path or source for the stage's part.

    Args:
        entry: the model.
        stage: "encoder", "denoiser" or "decoder".
        from_hub: whether the hubs may be asked; otherwise everything must be in the cache.

    Raises:
        DownloadError: a source can't be fetched.
    """
    component = entry.component(stage)
    parts = {name: _with_path(entry, part, from_hub) for name, part in component.parts.items()}
    component = replace(_with_path(entry, component, from_hub), parts=parts)
    entry = entry.with_component(stage, component)
    if entry.source is None or (entry.family and component.path):
        return entry
    return replace(entry, path=_fetched(entry.name, entry.source, stage, from_hub=from_hub))


def fetch_network(model: str, source: HubSource, *, from_hub: bool) -> WeightsPath:
    """Where one network's weights are, fetched if they are not there; arguments and errors as `fetch_sources`'."""
    return _fetched(model, source, "", from_hub=from_hub)


def _with_path(entry: ModelEntry, part: SomePart, from_hub: bool) -> SomePart:
    if part.source is None:
        return part
    return replace(part, path=fetch_network(entry.name, part.source, from_hub=from_hub))


def _fetched(model: str, source: HubSource, stage: str, *, from_hub: bool) -> WeightsPath:
    started = time.monotonic()
    try:
        with redirect_stderr(io.StringIO()):  # the libraries' progress bars have no place in a log
            path = _fetch(source, stage, local_only=not from_hub)
    except (DownloadError, InvalidRequestError) as error:
        raise DownloadError(f"model {model!r}: {error.message}") from error
    facts = {"model": model, "source": str(source), "path": path, "seconds": round(time.monotonic() - started, 3)}
    _log.info("weights are here", extra=facts)
    return path


def _fetch(source: HubSource, stage: str, *, local_only: bool) -> WeightsPath:
    revision = source.revision or None
    if source.path:
        path = source.path if isinstance(source.path, str) else list(source.path)
        found = fetch_model(source.model, revision, path, source=source.hub, local_files_only=local_only)
        return found if isinstance(found, str) else tuple(found)
    snapshot = open_snapshot(source.hub, source.model, revision, local_only=local_only)
    names = [file.path for file in snapshot.files]
    if stage and _INDEX in names:
        return _fetch_folder(snapshot, _files_of_stage(names, stage))
    if "config.json" in names:
        return _fetch_folder(snapshot, _files_of_network(names, ""))
    weights = _weights_at_top(source, names)
    return tuple(str(path) for path in snapshot.fetch([file for file in snapshot.files if file.path in weights]))


def _weights_at_top(source: HubSource, names: Sequence[str]) -> list[str]:
    """The weights of a repository that is no folder in the diffusers layout: one file, or the shards of one."""
    files = [name for name in names if "/" not in name]
    weights = preferred_weights(files)
    if len(weights) != 1 and not set(FOLDER_FILES) & set(files):
        raise DownloadError(
            f"{source.model} at {source.hub} holds {', '.join(weights) or 'no safetensors'}: name the file as the "
            "source's 'path'"
        )
    return weights


def _fetch_folder(snapshot: Snapshot, names: Sequence[str]) -> str:
    snapshot.fetch([file for file in snapshot.files if file.path in names])
    return str(snapshot.folder)


def _files_of_stage(names: Sequence[str], stage: str) -> list[str]:
    """The files that a stage reads of a folder in the diffusers layout."""
    single = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _FILES[stage])]
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    hosted = [folder for folder in folders if any(fnmatchcase(folder, pattern) for pattern in _FOLDERS[stage])]
    return single + [name for folder in hosted for name in _files_of_network(names, f"{folder}/")]


def _files_of_network(names: Sequence[str], folder: str) -> list[str]:
    """The files of one network's folder: what is small, and of several forms of the weights the preferred one."""
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    files = [name for name in inside if "/" not in name]
    small = [name for name in files if name.endswith(_SMALL_SUFFIXES)]
    return [f"{folder}{name}" for name in (*small, *preferred_weights(files))]
