"""Our AutoencoderKL against diffusers' with the same random weights, from every layout that checkpoints come in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from safetensors.torch import save_file
from torch import Tensor

from services.decoder.models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLParams,
    LatentScale,
    load_autoencoder_kl,
    params_from_config,
)
from services.decoder.models.autoencoder_kl_keys import DIFFUSERS, DIFFUSERS_BEFORE_0_17, ORIGINAL, Layout
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.flux_layout import original_vae_tensors
from tests.support.ldm_layout import ldm_vae_tensors

CPU = torch.device("cpu")
SD15_SCALE = LatentScale(factor=0.18215)
FLUX_SCALE = LatentScale(factor=0.3611, shift=0.1159)
SD15_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def small_config(*widths: int, **options: Any) -> dict[str, Any]:
    """A diffusers config with these widths, finest level first."""
    return {
        **SD15_CONFIG,
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **options,
    }


def reference_vae(config: Mapping[str, Any]) -> ReferenceVAE:
    torch.manual_seed(0)
    vae = ReferenceVAE(**{name: value for name, value in config.items() if not name.startswith("_")}).eval()
    for parameter in vae.parameters():  # norms start as the identity and biases small: nothing would test them
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    return vae.requires_grad_(False)


def load(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, scale: LatentScale = SD15_SCALE
) -> AutoencoderKL:
    """Our VAE from a checkpoint file that holds `tensors`."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "vae.safetensors")
    checkpoint = open_checkpoint(folder / "vae.safetensors")
    return load_autoencoder_kl(checkpoint, config, device=CPU, dtype=torch.float32, latent_scale=scale)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


CONFIGS = {
    "four levels": small_config(8, 16, 24, 24),
    "two resnets a level": small_config(8, 16, layers_per_block=2, norm_num_groups=8),
    "one level": small_config(16),
    "sixteen latent channels and no quant convolutions": small_config(
        8, 8, 16, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (1, 7)])
def test_decode_equals_diffusers(tmp_path: Path, config: dict[str, Any], height: int, width: int) -> None:
    reference = reference_vae(config)
    vae = load(tmp_path, reference.state_dict(), config)
    latents = torch.randn(2, config["latent_channels"], height, width)
    assert relative_error(vae.decode(latents), reference.decode(latents).sample) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 51)])
def test_encode_equals_the_posterior_mean_of_diffusers(
    tmp_path: Path, config: dict[str, Any], height: int, width: int
) -> None:
    reference = reference_vae(config)
    vae = load(tmp_path, reference.state_dict(), config)
    image = torch.rand(2, 3, height, width) * 2 - 1
    assert relative_error(vae.encode(image), reference.encode(image).latent_dist.mean) <= 1e-5


def test_a_flat_picture_is_encoded_as_exactly(tmp_path: Path) -> None:
    config = small_config(16, 32)
    reference = reference_vae(config)
    image = torch.ones(1, 3, 256, 256)
    image[..., 100:110, 100:110] = -1  # groups whose mean is many deviations
    vae = load(tmp_path, reference.state_dict(), config)
    assert relative_error(vae.encode(image), reference.encode(image).latent_dist.mean) <= 1e-5


def test_every_layout_gives_the_same_bits(tmp_path: Path) -> None:
    config = small_config(8, 16, 24)
    tensors = reference_vae(config).state_dict()
    old_names = {
        re.sub(
            r"attentions\.0\.(to_q|to_k|to_v|to_out\.0)", lambda found: f"attentions.0.{OLD_NAMES[found[1]]}", name
        ): t
        for name, t in tensors.items()
    }
    latents = torch.randn(1, 4, 6, 5)
    expected = load(tmp_path, tensors, config).decode(latents)
    assert torch.equal(load(tmp_path, old_names, config).decode(latents), expected)
    assert torch.equal(load(tmp_path, ldm_vae_tensors(tensors, levels=3), config).decode(latents), expected)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_a_single_file_needs_no_config(tmp_path: Path) -> None:
    config = small_config(32, 64, layers_per_block=2, norm_num_groups=32)
    single_file = ldm_vae_tensors(reference_vae(config).state_dict(), levels=2)
    single_file["model.diffusion_model.out.0.weight"] = torch.zeros(3)  # of the UNet, which shares the file
    vae = load(tmp_path, single_file, config=None)
    assert vae.params == params_from_config(config, SD15_SCALE)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_flux_has_more_channels_a_shift_and_no_quant_convolutions(tmp_path: Path, prefix: str) -> None:
    config = small_config(
        32,
        64,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=FLUX_SCALE.factor,
        shift_factor=FLUX_SCALE.shift,
    )
    reference = reference_vae(config)
    single_file = original_vae_tensors(reference.state_dict(), levels=2, prefix=prefix)
    by_shapes = load(tmp_path, single_file, None, FLUX_SCALE)
    by_config = load(tmp_path, reference.state_dict(), config)
    assert by_shapes.params == by_config.params
    image, latents = torch.randn(1, 3, 16, 12).clamp(-1, 1), torch.randn(1, 16, 6, 5)
    expected_latents = (reference.encode(image).latent_dist.mode() - 0.1159) * 0.3611
    expected_image = reference.decode(latents / 0.3611 + 0.1159).sample
    for vae in (by_shapes, by_config):
        assert relative_error(vae.normalize(vae.encode(image)), expected_latents) <= 1e-5
        assert relative_error(vae.decode(vae.denormalize(latents)), expected_image) <= 1e-5


def test_a_config_that_names_no_scale_has_its_familys() -> None:
    assert params_from_config(small_config(32, 64), FLUX_SCALE).latent_scale == FLUX_SCALE


def real_width_names(layout: Layout) -> list[str]:
    with torch.device("meta"):
        vae = AutoencoderKL(params_from_config(SD15_CONFIG, SD15_SCALE))
    return [source for name in vae.state_dict() for source in layout.sources(name, levels=4)]


def test_names_are_a_bijection_with_the_real_checkpoints() -> None:
    with torch.device("meta"):
        theirs = ReferenceVAE(**{name: value for name, value in SD15_CONFIG.items() if name != "_class_name"})
    diffusers, original = real_width_names(DIFFUSERS), real_width_names(ORIGINAL)
    assert sorted(diffusers) == sorted(theirs.state_dict())
    assert sorted(f"first_stage_model.{name}" for name in original) == sorted(
        ldm_vae_tensors(theirs.state_dict(), levels=4)
    )
    assert len(set(real_width_names(DIFFUSERS_BEFORE_0_17))) == len(diffusers)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"out_channels": 4}, "out_channels"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv"),
        ({"invented_option": 1}, "invented_option"),
    ],
)
def test_an_option_that_would_change_the_picture_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        params_from_config({**SD15_CONFIG, **change}, SD15_SCALE)


def test_a_config_without_its_sizes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="block_out_channels"):
        params_from_config({"scaling_factor": 0.13025}, SD15_SCALE)


def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    config = small_config(8, 16)
    tensors = reference_vae(config).state_dict()
    with pytest.raises(CheckpointError, match="holds no AutoencoderKL"):
        load(tmp_path, {"unet.weight": torch.zeros(1)}, config)
    del tensors["decoder.conv_out.bias"]
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        load(tmp_path, tensors, config)


def test_denormalize_undoes_normalize() -> None:
    params = AutoencoderKLParams(
        block_channels=(4,),
        resnets_per_level=1,
        latent_channels=16,
        norm_groups=1,
        quant_conv=False,
        latent_scale=LatentScale(factor=0.3611, shift=0.1159),
    )
    vae, mean = AutoencoderKL(params), torch.randn(1, 16, 2, 2)
    torch.testing.assert_close(vae.normalize(mean), (mean - 0.1159) * 0.3611)
    torch.testing.assert_close(vae.denormalize(vae.normalize(mean)), mean)


def test_bf16_stays_close_to_float32(tmp_path: Path) -> None:
    config = small_config(8, 16, 24)
    vae = load(tmp_path, reference_vae(config).state_dict(), config)
    latents = torch.randn(1, 4, 6, 5)
    expected = vae.decode(latents)
    assert relative_error(vae.to(torch.bfloat16).decode(latents).float(), expected) <= 0.03
