from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import CheckpointError
from services.denoiser.models.wan_dit import WanDiT, load_wan_dit, stack_context
from services.modeling.weights import open_checkpoint
from tests.support.scaled_layout import scaled, unscaled
from tests.support.wan_layout import save_original_dit

CPU = torch.device("cpu")
TOLERANCE = 1e-5
TEXT_WIDTH, TEXT_TOKENS, IMAGE_WIDTH, IMAGE_TOKENS = 32, 512, 48, 257
SIZE = (3, 8, 12)  # frames, height and width of the latent

TEXT_TO_VIDEO: dict[str, Any] = {}
IMAGE_TO_VIDEO = {"in_channels": 36, "image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 256}
FIRST_LAST_FRAME = IMAGE_TO_VIDEO | {"pos_embed_seq_len": 2 * IMAGE_TOKENS}
WAN22_IMAGE_TO_VIDEO = {"in_channels": 36}
KINDS = {
    "t2v": TEXT_TO_VIDEO,
    "i2v": IMAGE_TO_VIDEO,
    "flf2v": FIRST_LAST_FRAME,
    "wan2.2-i2v": WAN22_IMAGE_TO_VIDEO,
}


def _reference(options: Mapping[str, Any]) -> WanTransformer3DModel:
    """diffusers' transformer of small random weights, with heads as wide as the real one's."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=TEXT_WIDTH, ffn_dim=160, num_layers=2, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _load(reference: WanTransformer3DModel, folder: Path) -> WanDiT:
    reference.save_pretrained(folder)
    return load_wan_dit(open_checkpoint(folder), dict(reference.config), device=CPU, dtype=torch.float32)


def _inputs(dit: WanDiT, batch: int = 1) -> dict[str, Any]:
    params, generator = dit.params, torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    image_tokens = params.image_positions or IMAGE_TOKENS
    return {
        "latents": random(params.out_channels, *SIZE),
        "prompt_embeds": random(TEXT_TOKENS, TEXT_WIDTH),
        "image_embeds": None if params.image_width is None else random(image_tokens, IMAGE_WIDTH),
        "image_latents": random(20, *SIZE) if params.in_channels == 36 else None,
    }


def _run(dit: WanDiT, inputs: Mapping[str, Any], timesteps: Tensor) -> Tensor:
    with torch.inference_mode():
        context = dit.prepare(inputs["prompt_embeds"], inputs["image_embeds"], inputs["image_latents"], SIZE)
        return dit(inputs["latents"], timesteps, context)


def _run_reference(reference: WanTransformer3DModel, inputs: Mapping[str, Any], timesteps: Tensor) -> Tensor:
    parts = [part for part in (inputs["latents"], inputs["image_latents"]) if part is not None]
    image = inputs["image_embeds"]
    if image is not None and reference.config.pos_embed_seq_len:
        image = image.view(-1, IMAGE_TOKENS, IMAGE_WIDTH)  # the reference has the two pictures in the batch
    with torch.inference_mode():
        output: Tensor = reference(torch.cat(parts, dim=1), timesteps, inputs["prompt_embeds"], image).sample
    return output


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_equals_diffusers(kind: str, tmp_path: Path) -> None:
    reference = _reference(KINDS[kind])
    dit = _load(reference, tmp_path)
    inputs, timesteps = _inputs(dit), torch.tensor([437.5])
    _assert_close(_run(dit, inputs, timesteps), _run_reference(reference, inputs, timesteps))


def test_each_token_may_have_a_timestep_of_its_own(tmp_path: Path) -> None:
    reference = _reference(TEXT_TO_VIDEO)
    dit = _load(reference, tmp_path)
    inputs = _inputs(dit)
    timesteps = torch.linspace(0, 999, SIZE[0] * SIZE[1] * SIZE[2] // 4)[None]
    _assert_close(_run(dit, inputs, timesteps), _run_reference(reference, inputs, timesteps))


@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_a_batch_equals_its_rows_alone(kind: str, tmp_path: Path) -> None:
    dit = _load(_reference(KINDS[kind]), tmp_path)
    both, timesteps = _inputs(dit, batch=2), torch.tensor([900.0, 100.0])
    alone: list[dict[str, Any]] = [
        {name: None if x is None else x[i : i + 1] for name, x in both.items()} for i in range(2)
    ]
    with torch.inference_mode():
        context = stack_context(
            [dit.prepare(row["prompt_embeds"], row["image_embeds"], row["image_latents"], SIZE) for row in alone]
        )
        together = dit(both["latents"], timesteps, context)
    _assert_close(together, torch.cat([_run(dit, row, timesteps[i : i + 1]) for i, row in enumerate(alone)]))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_layout_loads_without_a_config(kind: str, prefix: str, tmp_path: Path) -> None:
    reference = _reference(KINDS[kind])
    dit = _load(reference, tmp_path / "diffusers")
    path = save_original_dit(tmp_path / "diffusers", dit.state_dict(), tmp_path / "wan.safetensors", prefix)
    original = load_wan_dit(open_checkpoint(path), None, device=CPU, dtype=torch.float32)
    assert original.params == dit.params
    weights = dit.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in original.state_dict().items())


def test_a_scaled_file_is_the_products_with_its_scales(tmp_path: Path) -> None:
    dit = _load(_reference(KINDS["t2v"]), tmp_path / "diffusers")
    original = load_file(save_original_dit(tmp_path / "diffusers", dit.state_dict(), tmp_path / "wan.safetensors"))
    files = {"scaled": scaled(original, "model.diffusion_model.")}
    files["plain"] = unscaled(files["scaled"])
    loaded = []
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        checkpoint = open_checkpoint(tmp_path / f"{name}.safetensors")
        loaded.append(load_wan_dit(checkpoint, None, device=CPU, dtype=torch.float32).state_dict())
    assert all(torch.equal(weight, loaded[1][name]) for name, weight in loaded[0].items())


def test_every_weight_is_in_one_block_that_streams(tmp_path: Path) -> None:
    dit = _load(_reference(FIRST_LAST_FRAME), tmp_path)
    in_blocks = {
        parameter for block in dit.weight_blocks() for module in block.modules for parameter in module.parameters()
    }
    assert in_blocks == set(dit.parameters())


def test_an_option_that_is_not_wans_is_refused_by_its_name(tmp_path: Path) -> None:
    reference = _reference(TEXT_TO_VIDEO)
    reference.save_pretrained(tmp_path)
    config = dict(reference.config) | {"qk_norm": None}
    with pytest.raises(CheckpointError, match="qk_norm"):
        load_wan_dit(open_checkpoint(tmp_path), config, device=CPU, dtype=torch.float32)
