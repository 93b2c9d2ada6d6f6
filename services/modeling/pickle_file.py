"""torch's own files (.pth, .pt, .ckpt, .bin), which are pickle: read only where the operator allows that by name.

A pickle can name any function to be called while it loads. torch's reader with `weights_only` knows those that make
tensors, dicts and numbers, and refuses all others.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import CheckpointError
from services.modeling.tensor_file import Shape

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_STATE = "state_dict"  # under which trainers put the weights, beside the optimizer's


class PickleFile:
    """A state dict that torch saved, mapped into memory.

    Raises CheckpointError if it is damaged, or has anything but tensors and plain values in it.
    """

    def __init__(self, file: Path) -> None:
        content = _read(file)
        state = content.get(_STATE, content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not any(isinstance(each, Tensor) for each in state.values()):
            raise CheckpointError(f"{file} holds no weights by name: it is no state dict; give another file")
        self._tensors = {str(name): each for name, each in state.items() if isinstance(each, Tensor)}

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def metadata(self) -> Mapping[str, str]:
        """There is none."""
        return {}

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file, not a copy."""
        return self._tensors[name].detach()

    def stored(self, name: str) -> tuple[str, Tensor]:
        tensor = self.tensor(name)
        return str(tensor.dtype), tensor.reshape(-1).view(torch.uint8)


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is refused: it is damaged, or would run code while it loads ({_first_sentence(error)}); take a "
            "safetensors file"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{file} can't be read: it is cut short, or as torch before 1.6 wrote it ({_first_sentence(error)}); "
            "download it again, or take a safetensors file"
        ) from error


def _first_sentence(error: Exception) -> str:
    """torch's own advice, to allow more, is left out."""
    return str(error).strip().splitlines()[0].split(". ")[0]
