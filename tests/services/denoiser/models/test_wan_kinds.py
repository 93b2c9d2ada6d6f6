"""The kinds of Wan models are told by dimensions alone, in either layout, and each has its own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import DenoiserDescription
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE
from services.common.manifest import ModelEntry
from services.denoiser.models.wan import WanDenoiser
from tests.support.tiny_wan import tiny_wan_dit
from tests.support.wan_layout import save_original_dit

CPU = torch.device("cpu")
LED: dict[str, Any] = {"in_channels": 36, "image_dim": 160, "added_kv_proj_dim": 256}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": LED,
    "flf2v": {**LED, "pos_embed_seq_len": 34},
    "wan2.2-i2v": {"in_channels": 36},
}


def save(folder: Path, **options: Any) -> Path:
    tiny_wan_dit(**options).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    return folder


def load(path: Path, **fields: Any) -> WanDenoiser:
    return WanDenoiser.load(ModelEntry(name="tiny", path=str(path), family="wan", **fields), CPU)


def shift(denoiser: WanDenoiser) -> float:
    return denoiser.sampling.schedules["flow"]["shift"]


def described(path: Path) -> tuple[DenoiserDescription, float]:
    denoiser = load(path)
    return denoiser.describe("tiny").denoiser, shift(denoiser)


@pytest.mark.parametrize(
    ("kind", "keyframes", "defaults"),
    [
        ("t2v", (0, 0), (5, 5, 50, 16)),
        ("i2v", (1, 16), (5, 5, 50, 16)),
        ("flf2v", (2, 2), (16, 5, 50, 16)),
        ("wan2.2-i2v", (1, 16), (5, 3.5, 40, 16)),
    ],
)
def test_each_kind_has_its_defaults_in_both_layouts(
    kind: str, keyframes: tuple[int, int], defaults: tuple[float, ...], tmp_path: Path
) -> None:
    folder = save(tmp_path, **KINDS[kind])
    names = load(folder).network.module.state_dict()
    file = save_original_dit(folder / "transformer", names, tmp_path / "wan.safetensors")
    for path in (folder, file):
        said, its_shift = described(path)
        assert (said.min_keyframes, said.max_keyframes) == keyframes
        assert (its_shift, said.default_guidance_scale, said.default_steps, said.default_fps) == defaults
        assert (MEDIA_ROLE_IMAGE in said.inputs) == (kind != "t2v")
        assert ("image_embeds" in said.conditioning) == ("image_dim" in KINDS[kind])
        assert said.latent_channels == 16


def test_the_folders_shift_and_the_manifests_defaults_go_before_the_kinds(tmp_path: Path) -> None:
    folder = save(tmp_path, **KINDS["flf2v"])
    (folder / "scheduler").mkdir()
    config = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    denoiser = load(folder, defaults={"steps": 7, "guidance_scale": 2.0})
    said = denoiser.describe("tiny").denoiser
    assert (shift(denoiser), said.default_steps, said.default_guidance_scale) == (3.0, 7, 2.0)


def test_a_model_that_takes_something_else_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, in_channels=32)
    with pytest.raises(CheckpointError, match=r"model 'tiny'.*takes 16 channels beside the 16"):
        load(folder)
