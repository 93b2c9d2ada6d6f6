"""Laws of loading: each model by the loader of its family, and a family without one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safelight.errors import CheckpointError
from services.common.manifest import Component, ModelEntry
from services.modeling.loading import load_models, load_stage

CPU = torch.device("cpu")
LOADERS = {
    "sd15": lambda entry, device: f"{entry.name} by sd15 on {device}",
    "flux": lambda entry, device: f"{entry.name} by flux on {device}",
}


def test_every_model_is_loaded_by_its_family_s_loader() -> None:
    entries = [ModelEntry(name="a", path="/a", family="flux"), ModelEntry(name="b", path="/b", family="sd15")]
    assert load_models(entries, LOADERS, CPU) == {"a": "a by flux on cpu", "b": "b by sd15 on cpu"}


def test_a_family_without_a_loader_is_named_with_those_there_are() -> None:
    with pytest.raises(CheckpointError, match="model 'a': family 'wan' is not one of sd15, flux"):
        load_models([ModelEntry(name="a", path="/a", family="wan")], LOADERS, CPU)


def test_a_model_that_is_not_there_ends_the_loading(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model 'a': .*absent does not exist"):
        load_models([ModelEntry(name="a", path=str(tmp_path / "absent"))], LOADERS, CPU)


def test_a_model_may_name_the_device_of_a_stage() -> None:
    entries = [
        ModelEntry(name="a", path="/a", family="sd15", denoiser=Component(device="meta")),
        ModelEntry(name="b", path="/b", family="sd15", decoder=Component(device="meta")),
    ]
    loaded = load_stage("denoiser", entries, LOADERS, CPU, from_hub=False)
    assert loaded == {"a": "a by sd15 on meta", "b": "b by sd15 on cpu"}


def test_a_device_that_is_not_there_is_named() -> None:
    entry = ModelEntry(name="a", path="/a", family="sd15", denoiser=Component(device="cuda:99"))
    with pytest.raises(CheckpointError, match="device 'cuda:99' is not on this machine"):
        load_stage("denoiser", [entry], LOADERS, CPU, from_hub=False)
