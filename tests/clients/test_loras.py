"""LoRAs by the SDK: a pipeline's, a client's, the command line's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from safelight import (
    Client,
    InvalidRequestError,
    LoraConfig,
    SDImagePipeline,
    SDPipelineConfig,
    UnknownAdapterError,
    UnsupportedError,
)
from safelight.cli import run
from tests.support.lora_files import kohya, save

LAYERS = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (64, 64),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return save(kohya(LAYERS, alpha=16.0), tmp_path / "style.safetensors")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return save(kohya(LAYERS, alpha=16.0, seed=50), tmp_path / "other.safetensors")


@pytest.fixture
def clean(pipeline: SDImagePipeline) -> Iterator[SDImagePipeline]:
    """The pipeline, without LoRAs before and after."""
    yield pipeline
    pipeline.unload_loras()


def draw(pipeline: SDImagePipeline) -> Image.Image:
    return pipeline(prompt="a cat", width=64, height=64, num_inference_steps=3, seed=1)


def alike(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_a_lora_changes_the_pictures_until_it_is_unloaded(clean: SDImagePipeline, style: Path) -> None:
    plain = draw(clean)
    clean.load_lora(path=str(style), scale=1.0)
    styled = draw(clean)
    assert not alike(styled, plain)
    clean.load_lora(path=style, scale=2)
    assert not alike(draw(clean), styled)
    clean.unload_loras()
    assert alike(draw(clean), plain)
    clean.unload_loras()


def test_several_add_up_whatever_is_said_of_fusing(clean: SDImagePipeline, style: Path, other: Path) -> None:
    clean.load_loras([(str(style), 1), (str(other), LoraConfig(0.5))], fused=False)
    both = draw(clean)
    clean.unload_loras()
    clean.load_lora(str(other), 0.5, True, True)
    clean.load_lora(str(style), 1)
    assert alike(draw(clean), both)


def test_of_several_all_are_loaded_or_none(clean: SDImagePipeline, style: Path, tmp_path: Path) -> None:
    plain = draw(clean)
    with pytest.raises(InvalidRequestError, match="does not exist"):
        clean.load_loras([(style, 1.0), (tmp_path / "none.safetensors", 1.0)])
    assert alike(draw(clean), plain)


def test_what_a_lora_can_t_be_asked_is_refused(clean: SDImagePipeline, style: Path) -> None:
    with pytest.raises(InvalidRequestError, match="scale: is 'much'"):
        clean.load_lora(style, "much")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="scheduler_config: 'beta_start' is not served"):
        clean.load_lora(style, LoraConfig(1.0, {"beta_start": 0.1}))


def test_a_lora_s_schedule_is_asked_for_until_the_lora_is_gone(clean: SDImagePipeline, style: Path) -> None:
    clean.load_lora(style, LoraConfig(1.0, {"shift": 3}))
    with pytest.raises(InvalidRequestError, match=r"schedule.*'?flow'?"):
        draw(clean)  # the model has no flow's
    clean.load_lora(style, 1.0)
    draw(clean)
    clean.unload_loras()


def test_a_client_loads_lists_names_and_unloads(endpoint: str, style: Path) -> None:
    with Client(endpoint) as client:
        loaded = client.load_adapter(style)
        try:
            assert (loaded.name, loaded.path) == ("style", str(style))
            assert {report.stage: report.matched_keys for report in loaded.reports} == {"encoder": 3, "denoiser": 3}
            assert client.list_adapters() == [loaded]
            assert client.models()[0].adapters == ("style",)
            made = client.generate("a cat", width=64, height=64, steps=2, adapters={"style": 0.5}).images[0]
            assert made.receipt.adapters == {"style": 0.5}
            assert made.receipt.adapter_fingerprints == {"style": loaded.fingerprint}
            assert made.receipt.options().adapter_fingerprints == {"style": loaded.fingerprint}
            with pytest.raises(UnknownAdapterError, match="another file"):
                client.generate("a cat", adapters={"style": 1.0}, adapter_fingerprints={"style": "other"})
        finally:
            client.unload_adapter("style")
        assert client.list_adapters() == []
        with pytest.raises(UnknownAdapterError, match="loaded are: none"):
            client.generate("a cat", adapters={"style": 1.0})


def test_the_command_line_loads_lists_uses_and_unloads(
    endpoint: str, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELIGHT_ENDPOINT", endpoint)
    assert run(["adapters", "load", str(style), "--name", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "mine"
    assert run(["adapters", "list"]) == 0
    assert "mine" in capsys.readouterr().out
    output = tmp_path / "cat.png"
    options = ["--width", "64", "--height", "64", "--steps", "2", "--output", str(output)]
    assert run(["generate", "a cat", "--adapter", "mine=0.7", *options]) == 0
    assert output.exists()
    assert run(["adapters", "unload", "mine"]) == 0
    assert run(["adapters", "unload", "mine"]) == 2
    assert run(["generate", "a cat", "--adapter", "mine=much", *options]) == 2
    assert "must be NAME or NAME=SCALE" in capsys.readouterr().err


def test_a_pipeline_at_a_gateway_loads_into_it(endpoint: str, style: Path) -> None:
    with SDImagePipeline.from_pretrained(SDPipelineConfig("tiny", endpoint=endpoint)) as remote:
        plain = draw(remote)
        remote.load_lora(style, 1.0)
        assert not alike(draw(remote), plain)
        remote.unload_loras()
        assert alike(draw(remote), plain)
