"""Models that a manifest names at a hub: through the whole stack, and how a start ends that can't have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight import CheckpointError, Client, EmbeddedStack
from tests.clients.processes import start
from tests.support.model_hubs import ModelScopeHub


@pytest.fixture
def hub(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeHub]:
    """A hub with the tiny model's folder."""
    files = {str(path.relative_to(tiny_sd15)): path.read_bytes() for path in tiny_sd15.rglob("*") if path.is_file()}
    hub = ModelScopeHub({"acme/tiny": {"master": {**files, "safety_checker/model.safetensors": b"not needed"}}})
    for name, value in {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_HOME": str(tmp_path),
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        "SAFELIGHT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.close()


MODEL = {"name": "tiny", "source": {"model": "acme/tiny"}}


def test_the_stack_fetches_each_file_once_and_draws_also_without_the_hub(
    hub: ModelScopeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in ({}, {"fetch": False}):
        with EmbeddedStack([MODEL], device="cpu", **settings) as stack, Client(stack.endpoint) as client:
            assert client.generate("a cat", width=64, height=64, steps=1).images
    paths = [asked.path for asked in hub.asked]
    assert len(paths) == len(set(paths))
    assert "unet/diffusion_pytorch_model.safetensors" in paths
    assert "safety_checker/model.safetensors" not in paths
    assert "safelight: fetching vae/config.json of acme/tiny at modelscope, 0.00 GB" in capsys.readouterr().err


def test_a_stack_whose_model_can_not_be_fetched_says_why(hub: ModelScopeHub) -> None:
    hub.faults.token = "secret"
    with pytest.raises(CheckpointError, match="model 'tiny': acme/tiny at modelscope: refused"):
        EmbeddedStack([MODEL], device="cpu")


@pytest.mark.parametrize(
    ("model", "cuts", "sentence"),
    [
        ("acme/none", 0, "acme/none at modelscope: not found (HTTP 404): check the name"),
        ("acme/tiny", 9, "acme/tiny at modelscope: model_index.json did not arrive whole: try again"),
    ],
)
def test_a_stage_ends_its_start_with_one_sentence_and_leaves_nothing_that_looks_whole(
    hub: ModelScopeHub, tmp_path: Path, model: str, cuts: int, sentence: str
) -> None:
    hub.faults.cut_at, hub.faults.cuts = 1, cuts
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(json.dumps({"models": [{"name": "tiny", "source": {"model": model}}]}))
    with start(["-m", "services.decoder", f"--manifest={manifest}"], tmp_path) as process:
        _, err = process.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert (process.returncode, last.startswith(f"decoder: model 'tiny': {sentence}")) == (2, True), err
    assert not list((tmp_path / "cache").glob("*/*/*/*/model_index.json"))
