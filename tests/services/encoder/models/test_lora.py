"""LoRAs of text encoders equal the changes written out on their weights, each prompt of a batch with its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.manifest import Component, ModelEntry
from services.encoder.encoding import PromptJob, encode_batch
from services.encoder.registry import LOADERS, PromptEncoder
from services.modeling.lora.adapter import Applied
from services.modeling.lora.layouts import TEXT_ENCODERS
from services.modeling.lora.reading import read_adapter
from services.modeling.placement import Placement
from tests.support.lora_files import dotted, kohya, of_every_kind, save
from tests.support.tiny_flux import save_tiny_flux
from tests.support.tiny_sd15 import save_tiny_sd15
from tests.support.tiny_sdxl import save_tiny_sdxl

CPU = torch.device("cpu")
CLIP_LAYER = "encoder.layers.0.self_attn.v_proj"
T5_LAYER = "encoder.block.1.layer.1.DenseReluDense.wi_0"


@dataclass(frozen=True)
class Case:
    """A layer by its name in a file.

    Args:
        family: of the model.
        name: in the file, of kohya's layout where it begins with "lora_", of diffusers' otherwise.
        folder: of the network.
        layer: its name there, without what transformers puts before it.
    """

    family: str
    name: str
    folder: str
    layer: str


SAVE: dict[str, Callable[[Path], Path]] = {"sd15": save_tiny_sd15, "sdxl": save_tiny_sdxl, "flux": save_tiny_flux}
KOHYA_CLIP, KOHYA_T5 = f"text_model_{CLIP_LAYER.replace('.', '_')}", T5_LAYER.replace(".", "_")
CASES = [
    Case("sd15", f"lora_te_{KOHYA_CLIP}", "text_encoder", CLIP_LAYER),
    Case("sd15", f"text_encoder.text_model.{CLIP_LAYER}", "text_encoder", CLIP_LAYER),
    Case("sdxl", f"lora_te1_{KOHYA_CLIP}", "text_encoder", CLIP_LAYER),
    Case("sdxl", f"lora_te2_{KOHYA_CLIP}", "text_encoder_2", CLIP_LAYER),
    Case("sdxl", f"text_encoder_2.text_model.{CLIP_LAYER}", "text_encoder_2", CLIP_LAYER),
    Case("flux", f"lora_te1_{KOHYA_CLIP}", "text_encoder", CLIP_LAYER),
    Case("flux", f"lora_te3_{KOHYA_T5}", "text_encoder_2", T5_LAYER),
    Case("flux", f"text_encoder_2.{T5_LAYER}", "text_encoder_2", T5_LAYER),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family) / "model") for family, write in SAVE.items()}


def load(family: str, folder: Path, **component: Any) -> PromptEncoder:
    return LOADERS[family](ModelEntry(name="tiny", path=str(folder), encoder=Component(**component)), CPU)


def encode(encoder: PromptEncoder, prompts: list[tuple[str, tuple[Applied, ...]]]) -> list[dict[str, Tensor]]:
    """What each prompt is, with its adapters; an empty one is a negative prompt."""
    jobs = [
        PromptJob("tiny", encoder.tokenize(prompt, negative=not prompt), 1, False, adapters)
        for prompt, adapters in prompts
    ]
    return [dict(tensors) for tensors in encode_batch({"tiny": encoder}, jobs)]


def shape_of(case: Case, folder: Path) -> tuple[int, ...]:
    (file, key) = _place(case, folder)
    return tuple(load_file(file)[key].shape)


def _place(case: Case, folder: Path) -> tuple[Path, str]:
    """The file that holds the layer's weight, and its name there."""
    for file in sorted((folder / case.folder).glob("*.safetensors")):
        for key in load_file(file):
            if key.removeprefix("text_model.") == f"{case.layer}.weight":
                return file, key
    raise AssertionError(f"{case.layer} is in no file")


def with_change(case: Case, folder: Path, change: Tensor, target: Path) -> PromptEncoder:
    """The encoder, loaded from weights with the change written out."""
    shutil.copytree(folder, target)
    file, key = _place(case, target)
    tensors = load_file(file)
    tensors[key] = tensors[key] + change
    save_file(tensors, file, {"format": "pt"})
    return load(case.family, target)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.name}")
def test_a_prompt_with_a_lora_is_as_with_changed_weights(case: Case, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[case.family]
    shape = {case.name: shape_of(case, folder)}
    tensors = kohya(shape, alpha=None) if case.name.startswith("lora_") else dotted(shape)
    encoder = load(case.family, folder)
    file = save(tensors, tmp_path / "lora.safetensors")
    adapter = read_adapter("lora", str(file), encoder.networks, TEXT_ENCODERS)
    assert (adapter.match.matched, adapter.match.unmatched) == (2, ())
    down, up = tensors.values()
    changed = with_change(case, folder, 3.0 * (up @ down), tmp_path / "changed")
    applied = (Applied(adapter, 3.0),)
    (plain,), (expected,) = encode(encoder, [("a cat", ())]), encode(changed, [("a cat", ())])
    # An empty negative prompt may be no row of the networks; the others have their own adapters all the same.
    batch = encode(encoder, [("a dog", ()), ("", ()), ("a cat", applied), ("a cat", ())])
    assert any(float((plain[name] - expected[name]).abs().max()) > 1e-3 for name in plain)
    for name in plain:
        torch.testing.assert_close(batch[2][name], expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch[3][name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SAVE)
def test_a_lora_beside_weights_that_stream_is_what_it_is_beside_others(
    family: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {
        case.name: shape_of(case, folders[family]) for case in CASES if case.family == family and "lora" in case.name
    }
    file = save(of_every_kind(named), tmp_path / "lora.safetensors")

    def encoded(encoder: PromptEncoder) -> dict[str, Tensor]:
        adapter = read_adapter("lora", str(file), encoder.networks, TEXT_ENCODERS)
        assert not adapter.match.unmatched
        return encode(encoder, [("a dog", ()), ("a cat", (Applied(adapter, 3.0),))])[1]

    expected = encoded(load(family, folders[family]))
    monkeypatch.setattr(Placement, "offloads", True)
    streaming = load(family, folders[family], memory_budget=2**16)
    for _ in range(2):
        torch.testing.assert_close(encoded(streaming), expected, rtol=1e-4, atol=1e-5)
