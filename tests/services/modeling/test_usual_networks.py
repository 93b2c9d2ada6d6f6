"""Laws of the networks that checkpoints come without: a stage fetches those it hosts, when nothing else has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.errors import DownloadError
from services.common.manifest import Component, ModelEntry, Part
from services.modeling.usual_networks import USUAL_NETWORKS, with_usual_networks
from tests.support.model_hubs import ModelScopeHub

NAMES = (
    "clip-bf16.safetensors",
    "t5-fp8-00001-of-00002.safetensors",
    "t5-fp8-00002-of-00002.safetensors",
    "ae-bf16.safetensors",
    "flux1-dev-fp8.safetensors",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeHub]:
    """The hub that has FLUX's networks."""
    hub = ModelScopeHub({"muse/FLUX.1-dev-fp8": {"master": dict.fromkeys(NAMES, b"weights")}})
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def checkpoint(tmp_path: Path, *names: str) -> ModelEntry:
    """A model in a single file with tensors of these names."""
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    return ModelEntry(name="a", path=str(file), family="flux")


def fetched(hub: ModelScopeHub) -> list[str]:
    """The files that were fetched."""
    return sorted(each.path for each in hub.asked)


@pytest.mark.parametrize(
    ("stage", "names"), [("encoder", [NAMES[0], NAMES[1], NAMES[2]]), ("denoiser", []), ("decoder", [NAMES[3]])]
)
def test_a_stage_fetches_the_networks_that_it_hosts_and_a_transformer_alone_lacks(
    hub: ModelScopeHub, tmp_path: Path, stage: str, names: list[str]
) -> None:
    entry = with_usual_networks(checkpoint(tmp_path, "double_blocks.0.weight"), "flux", stage, from_hub=True)
    assert fetched(hub) == sorted(names)
    component = entry.component(stage)
    assert [path.name for part in (component, *component.parts.values()) for path in part.paths] == names


def test_what_the_model_s_own_file_holds_is_not_fetched(hub: ModelScopeHub, tmp_path: Path) -> None:
    entry = checkpoint(tmp_path, "vae.decoder.weight", "text_encoders.clip_l.weight")
    assert with_usual_networks(entry, "flux", "decoder", from_hub=True) == entry
    with_usual_networks(entry, "flux", "encoder", from_hub=True)
    assert fetched(hub) == [NAMES[1], NAMES[2]]


def test_what_the_model_s_folder_holds_is_not_fetched(hub: ModelScopeHub, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    entry = ModelEntry(name="a", path=str(tmp_path), family="flux")
    assert with_usual_networks(entry, "flux", "decoder", from_hub=True) == entry
    with_usual_networks(entry, "flux", "encoder", from_hub=True)
    assert fetched(hub) == sorted(NAMES[:3])


def test_what_the_manifest_names_is_not_fetched_and_keeps_its_dtype(hub: ModelScopeHub, tmp_path: Path) -> None:
    parts = {"t5": Part(path="/weights/t5.gguf"), "clip_l": Part(dtype="float32")}
    entry = replace(checkpoint(tmp_path, "double_blocks.0.weight"), encoder=Component(dtype="bfloat16", parts=parts))
    encoder = with_usual_networks(entry, "flux", "encoder", from_hub=True).encoder
    assert fetched(hub) == [NAMES[0]]
    assert encoder.part("t5") == Part(path="/weights/t5.gguf", dtype="bfloat16")
    assert encoder.part("clip_l").dtype == "float32"


def test_without_text_no_text_encoder_is_fetched(hub: ModelScopeHub, tmp_path: Path) -> None:
    entry = replace(checkpoint(tmp_path, "double_blocks.0.weight"), load_text_encoder=False)
    assert with_usual_networks(entry, "flux", "encoder", from_hub=True) == entry
    assert not hub.asked


def test_a_model_without_a_path_is_where_a_network_of_the_stage_is(hub: ModelScopeHub) -> None:
    entry = ModelEntry(name="a", family="flux", denoiser=Component(path="/weights/dit.safetensors"))
    assert [path.name for path in with_usual_networks(entry, "flux", "decoder", from_hub=True).paths] == [NAMES[3]]
    assert with_usual_networks(entry, "flux", "denoiser", from_hub=True).path == "/weights/dit.safetensors"


def test_where_nothing_may_be_fetched_the_error_says_what_to_name(hub: ModelScopeHub, tmp_path: Path) -> None:
    entry = checkpoint(tmp_path, "double_blocks.0.weight")
    with pytest.raises(DownloadError, match=r"no text_encoder: .* clip-bf16.* \(encoder: \{parts: \{clip_l: \{path"):
        with_usual_networks(entry, "flux", "encoder", from_hub=False)
    with pytest.raises(DownloadError, match=r"^model 'a': .* have no vae: .* \(decoder: \{path: …\}\)$"):
        with_usual_networks(entry, "flux", "decoder", from_hub=False)
    assert not hub.asked


def test_a_family_whose_checkpoints_are_whole_fetches_nothing(hub: ModelScopeHub) -> None:
    entry = ModelEntry(name="a", path="/weights")
    assert [with_usual_networks(entry, "sd15", stage, from_hub=True) for stage in ("encoder", "decoder")] == [entry] * 2


def test_every_network_names_its_part_and_a_file() -> None:
    for stages in USUAL_NETWORKS.values():
        for networks in stages.values():
            assert all(network.source.path and network.prefixes for network in networks)
            assert len({network.part for network in networks}) == len(networks)


@pytest.mark.parametrize(
    ("name", "needed"), [("img_emb.proj.1.weight", True), ("blocks.0.cross_attn.norm_k.weight", False)]
)
def test_what_only_some_models_have_is_fetched_for_those_alone(
    name: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = USUAL_NETWORKS["wan"]["encoder"]
    sources = [source for each in encoders for source in (each.source, each.tokenizer) if source]
    hub = ModelScopeHub({source.model: {"master": {str(source.path): b"weights"}} for source in sources})
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path / "cache"))
    parts = with_usual_networks(checkpoint(tmp_path, name), "wan", "encoder", from_hub=True).encoder.parts
    hub.close()
    assert set(parts) == ({"umt5", "image_encoder"} if needed else {"umt5"})
