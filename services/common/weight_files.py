"""The names that weights have in a network's folder of the diffusers layout."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

# In the order of preference: full precision before fp16.
FOLDER_FILES = tuple(
    name
    for variant in ("", ".fp16")
    for stem in ("diffusion_pytorch_model", "model")
    for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json")
)


def preferred_weights(names: Collection[str]) -> list[str]:
    """Of the files of a folder, those with the weights: one file, the shards of one, or whatever safetensors it has."""
    for name in FOLDER_FILES:
        if name in names:
            stem, _, variant = name.removesuffix(".json").partition(".safetensors.index")
            return [name] if name.endswith(".safetensors") else _matching(names, f"{stem}{variant}-*.safetensors")
    return _matching(names, "*.safetensors")


def _matching(names: Collection[str], pattern: str) -> list[str]:
    return sorted(name for name in names if fnmatchcase(name, pattern))
