"""FLUX.1 without text: zeros of the published sizes for every prompt; other families refuse."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
from services.encoder.encoding import PromptJob, encode_batch
from services.encoder.registry import LOADERS

CPU = torch.device("cpu")
WITHOUT_TEXT = ModelEntry(name="a", path="/weights/absent.safetensors", load_text_encoder=False)


def test_every_prompt_is_zeros_and_no_file_is_read() -> None:
    encoder = LOADERS["flux"](WITHOUT_TEXT, CPU)
    jobs = [PromptJob("a", encoder.tokenize(prompt), 1, False, ()) for prompt in ("a cat", "")]
    for tensors in encode_batch({"a": encoder}, jobs):
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "prompt_embeds": (1, 512, 4096),
            "pooled_prompt_embeds": (1, 768),
        }
        assert not any(tensor.any() for tensor in tensors.values())
    assert not encoder.describe("a").encoder.inputs


@pytest.mark.parametrize("family", ["sd15", "sdxl", "wan"])
def test_other_families_need_text(family: str) -> None:
    with pytest.raises(CheckpointError, match=r"model 'a': load_text_encoder: only FLUX\.1"):
        LOADERS[family](WITHOUT_TEXT, CPU)
