"""A model, or a part of one, may lie in several files: the manifest takes a list, read as one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.errors import CheckpointError
from services.common.manifest import Component, ManifestError, ModelEntry, load_manifest
from services.modeling.components import detect_family, open_component

UNET_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Two files that share a tensor."""
    paths = (tmp_path / "first.safetensors", tmp_path / "second.safetensors")
    save_file({"shared": torch.zeros(1), "first": torch.zeros(1)}, paths[0])
    save_file({"shared": torch.ones(1), UNET_KEY: torch.zeros(1)}, paths[1])
    return tuple(map(str, paths))


def test_the_manifest_takes_a_list(tmp_path: Path, files: tuple[str, ...]) -> None:
    manifest = tmp_path / "models.yaml"
    manifest.write_text(f"models: [{{name: a, path: {list(files)}, decoder: {{path: {list(files[:1])}}}}}]")
    assert load_manifest(str(manifest)) == (ModelEntry(name="a", path=files, decoder=Component(path=files[:1])),)


@pytest.mark.parametrize(
    ("path", "sentence"), [("[a, 1]", r"path: \['a', 1\] must be a text, or a list"), ("[]", "path")]
)
def test_a_list_of_something_else_is_refused(tmp_path: Path, path: str, sentence: str) -> None:
    manifest = tmp_path / "models.yaml"
    manifest.write_text(f"models: [{{name: a, path: {path}}}]")
    with pytest.raises(ManifestError, match=sentence):
        load_manifest(str(manifest))


def test_several_files_are_one_checkpoint_of_which_the_last_goes_first(files: tuple[str, ...]) -> None:
    entry = ModelEntry(name="a", path=files)
    source = open_component(entry, entry.denoiser, "unet")
    assert source.config is None
    assert set(source.checkpoint) == {"shared", "first", UNET_KEY}
    assert source.checkpoint.tensor("shared").item() == 1
    assert detect_family(entry) == "sd15"


def test_a_component_s_own_files_go_before_the_model_s(files: tuple[str, ...]) -> None:
    entry = ModelEntry(name="a", path="nowhere", decoder=Component(path=files[:1]))
    assert set(open_component(entry, entry.decoder, "vae").checkpoint) == {"shared", "first"}


def test_one_that_is_missing_is_named(files: tuple[str, ...]) -> None:
    entry = ModelEntry(name="a", path=(*files, "nowhere.safetensors"))
    with pytest.raises(CheckpointError, match=r"model 'a': nowhere\.safetensors does not exist"):
        open_component(entry, entry.denoiser, "unet")
