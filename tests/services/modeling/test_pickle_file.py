"""torch's own files are read where that is allowed, and never run anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.errors import CheckpointError
from services.modeling.weights import Checkpoint, open_checkpoint

WEIGHTS = {"a.weight": torch.randn(6, 4).to(torch.bfloat16), "a.bias": torch.randn(6)}


def opened(content: object, folder: Path, **options: Any) -> Checkpoint:
    torch.save(content, folder / "model.pth", **options)
    return open_checkpoint(folder / "model.pth", allow_pickle=True)


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_has_the_names_and_tensors_that_were_saved(nested: bool, tmp_path: Path) -> None:
    checkpoint = opened({"state_dict": WEIGHTS, "epoch": 3} if nested else WEIGHTS, tmp_path)
    assert checkpoint.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.tensor(name), weight) for name, weight in WEIGHTS.items())
    assert checkpoint.shape("a.weight") == (6, 4)
    assert len(checkpoint.fingerprint) == 32


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.pth is refused: it is damaged, or would run code"):
        opened({**WEIGHTS, "evil": Malicious(tmp_path / "made")}, tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.ones(3)], ids=["list", "numbers", "tensor"])
def test_a_file_without_weights_by_name_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        opened(content, tmp_path)


def test_a_file_cut_short_or_of_old_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        opened(WEIGHTS, tmp_path, _use_new_zipfile_serialization=False)
    torch.save(WEIGHTS, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        open_checkpoint(tmp_path / "cut.pth", allow_pickle=True)


def test_an_index_brings_in_no_pickle_that_is_not_allowed(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "shard.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "shard.bin", "a.bias": "shard.bin"}}')
    with pytest.raises(CheckpointError, match=r"shard\.bin is a pickle file.*allow_pickle: true"):
        open_checkpoint(index)
    assert open_checkpoint(index, allow_pickle=True).keys() == WEIGHTS.keys()
