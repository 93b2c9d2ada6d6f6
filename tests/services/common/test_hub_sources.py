"""Laws of sources in a manifest: a stage fetches what it hosts, in one form, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.errors import DownloadError
from services.common.hub_sources import fetch_sources
from services.common.manifest import Component, HubSource, ModelEntry, Part
from tests.support.model_hubs import ModelScopeHub

FOLDER = dict.fromkeys(
    (
        "README.md",
        "model_index.json",
        "latent_preview.json",
        "sd15.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
    ),
    b"content",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeHub]:
    """A hub with models in all shapes."""
    hub = ModelScopeHub(
        {
            "acme/folder": {"master": FOLDER, "v1": FOLDER},
            "acme/vae": {"master": {"config.json": b"{}", "model.safetensors": b"v", "model.bin": b"v"}},
            "acme/file": {"master": {"README.md": b"#", "vae.safetensors": b"v", "more/a.safetensors": b"a"}},
            "acme/files": {"master": {"a.safetensors": b"a", "b.safetensors": b"b"}},
            "acme/none": {"master": {"model.bin": b"a"}},
            "acme/shards": {
                "master": dict.fromkeys(
                    ("model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"), b"a"
                )
            },
        }
    )
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def asked(hub: ModelScopeHub) -> set[str]:
    """The files that were fetched."""
    return {each.path for each in hub.asked}


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        (
            "encoder",
            {
                "model_index.json",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/vocab.json",
                "tokenizer/merges.txt",
            },
        ),
        (
            "denoiser",
            {
                "model_index.json",
                "latent_preview.json",
                "text_encoder/config.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors.index.json",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                "scheduler/scheduler_config.json",
            },
        ),
        ("decoder", {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"}),
    ],
)
def test_of_a_folder_a_stage_fetches_its_own_part(
    hub: ModelScopeHub, tmp_path: Path, stage: str, files: set[str]
) -> None:
    entry = fetch_sources(ModelEntry(name="a", source=HubSource(model="acme/folder")), stage, from_hub=True)
    assert entry.paths == (tmp_path / "cache" / "modelscope" / "acme" / "folder" / "__version",)
    assert asked(hub) == files


def test_a_file_of_a_repository_is_fetched_alone(hub: ModelScopeHub, tmp_path: Path) -> None:
    source = HubSource(model="acme/folder", path="sd15.safetensors", revision="v1")
    entry = fetch_sources(ModelEntry(name="a", source=source), "decoder", from_hub=True)
    assert entry.path == str(tmp_path / "cache" / "modelscope" / "acme" / "folder" / "v1" / "sd15.safetensors")
    assert asked(hub) == {"sd15.safetensors"}


def test_a_repository_of_one_file_needs_no_name_for_it(hub: ModelScopeHub) -> None:
    entry = fetch_sources(ModelEntry(name="a", source=HubSource(model="acme/file")), "decoder", from_hub=True)
    assert [path.name for path in entry.paths] == ["vae.safetensors"]
    assert asked(hub) == {"vae.safetensors"}


def test_a_repository_of_one_checkpoint_in_shards_needs_no_names(hub: ModelScopeHub) -> None:
    entry = fetch_sources(ModelEntry(name="a", source=HubSource(model="acme/shards")), "decoder", from_hub=True)
    assert [path.name for path in entry.paths] == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


@pytest.mark.parametrize(("model", "held"), [("acme/files", "a.safetensors, b.safetensors"), ("acme/none", "no safe")])
def test_of_several_checkpoints_or_none_a_name_is_asked_for(hub: ModelScopeHub, model: str, held: str) -> None:
    with pytest.raises(DownloadError, match=f"^model 'a': {model} at modelscope holds {held}.*: name the file"):
        fetch_sources(ModelEntry(name="a", source=HubSource(model=model)), "decoder", from_hub=True)
    assert not hub.asked


def test_a_part_s_source_is_fetched_by_its_stage_alone(hub: ModelScopeHub) -> None:
    entry = ModelEntry(
        name="a",
        path="/weights",
        encoder=Component(parts={"t5": Part(source=HubSource(model="acme/file"))}),
        decoder=Component(source=HubSource(model="acme/vae"), dtype="float32"),
    )
    for_denoiser = fetch_sources(entry, "denoiser", from_hub=True)
    assert (for_denoiser, asked(hub)) == (entry, set())
    for_decoder = fetch_sources(entry, "decoder", from_hub=True)
    assert (for_decoder.path, for_decoder.decoder.dtype) == ("/weights", "float32")
    assert [path.name for path in for_decoder.decoder.paths] == ["__version"]
    assert asked(hub) == {"config.json", "model.safetensors"}
    hub.asked.clear()
    for_encoder = fetch_sources(entry, "encoder", from_hub=True)
    assert [path.name for path in for_encoder.encoder.part("t5").paths] == ["vae.safetensors"]
    assert asked(hub) == {"vae.safetensors"}


def test_a_model_s_own_source_is_not_fetched_where_the_stage_s_part_is_elsewhere(hub: ModelScopeHub) -> None:
    source = HubSource(model="acme/folder", path="sd15.safetensors")
    entry = ModelEntry(name="a", family="sd15", source=source, decoder=Component(path="/weights/vae.safetensors"))
    assert not fetch_sources(entry, "decoder", from_hub=True).path
    assert not hub.asked


def test_what_can_not_be_fetched_is_named_with_the_model(hub: ModelScopeHub) -> None:
    for model, sentence in (
        ("acme/absent", "acme/absent at modelscope: not found"),
        ("none/of/these", "model_uri: is"),
    ):
        entry = ModelEntry(name="a", source=HubSource(model=model, path="x.safetensors"))
        with pytest.raises(DownloadError, match=f"^model 'a': {sentence}"):
            fetch_sources(entry, "decoder", from_hub=True)


def test_without_the_hubs_what_is_in_the_cache_is_taken(hub: ModelScopeHub) -> None:
    entry = ModelEntry(name="a", source=HubSource(model="acme/folder"))
    with pytest.raises(DownloadError, match=r"^model 'a': acme/folder at modelscope: nothing of it is in"):
        fetch_sources(entry, "decoder", from_hub=False)
    fetched = fetch_sources(entry, "decoder", from_hub=True)
    assert fetch_sources(entry, "decoder", from_hub=False) == fetched
    with pytest.raises(DownloadError, match=r"model 'a': .*text_encoder/config\.json, .* not whole in"):
        fetch_sources(entry, "encoder", from_hub=False)


def test_no_progress_bar_gets_into_the_log(hub: ModelScopeHub, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_sources(ModelEntry(name="a", source=HubSource(model="acme/folder")), "encoder", from_hub=True)
    assert "%" not in capfd.readouterr().err
