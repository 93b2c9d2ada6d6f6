"""The SD 1.x UNet equals diffusers' with the same weights, in both checkpoint layouts, and refuses what doesn't fit."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from services.denoiser.models.sd_unet import SDUNet, load_sd_unet, stack_context
from services.denoiser.models.sd_unet_keys import diffusers_sources, ldm_sources
from services.denoiser.models.sd_unet_params import params_from_config
from services.modeling.placement import Placement, place
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.ldm_layout import ldm_unet_name

CPU = torch.device("cpu")
TEXT_WIDTH = 24
ATTENDS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")

SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}


def levels(*attends: bool) -> dict[str, Any]:
    pairs = [ATTENDS if level else PLAIN for level in attends]
    return {
        "down_block_types": tuple(down for down, _ in pairs),
        "up_block_types": tuple(up for _, up in reversed(pairs)),
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "one level": {"block_out_channels": (32,), "layers_per_block": 1, **levels(True)},
    "two levels": {"block_out_channels": (32, 64), "layers_per_block": 2, **levels(True, False)},
    "three levels": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, **levels(False, True, True)},
    "like SD 1.5": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, **levels(True, True, True, False)},
    "nine channels in": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "in_channels": 9,
        **levels(True, False),
    },
}
SD15_LEVELS = levels(True, True, True, False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def reference_unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    options = {"cross_attention_dim": TEXT_WIDTH, "attention_head_dim": 8, **options}
    return UNet2DConditionModel(**options).eval()


def load(path: Path, config: Mapping[str, Any] | None, dtype: torch.dtype = torch.float32) -> SDUNet:
    unet = load_sd_unet(open_checkpoint(path), config, device=CPU, dtype=dtype)
    return place(unet, Placement(device=CPU, dtype=dtype), unet.weight_blocks()).network


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def inputs(channels: int, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, channels, height, width, generator=generator)
    return latents, torch.tensor([981.0, 3.5]), torch.randn(2, 7, TEXT_WIDTH, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def predict(unet: SDUNet, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    return unet(latents, timesteps, unet.project_context(context))


def ldm_file(path: Path, reference: UNet2DConditionModel) -> Path:
    """A single file as civitai's: the UNet among a VAE's and averaged weights."""
    tensors = {ldm_unet_name(name, reference.config): tensor for name, tensor in reference.state_dict().items()}
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    return saved(path, tensors | others)


@pytest.mark.parametrize(
    ("case", "size"), [*((case, (16, 16)) for case in CONFIGS), ("like SD 1.5", (10, 14)), ("like SD 1.5", (9, 7))]
)
def test_equals_diffusers(tmp_path: Path, case: str, size: tuple[int, int]) -> None:
    reference = reference_unet(**CONFIGS[case])
    reference.save_pretrained(tmp_path)
    latents, timesteps, context = inputs(reference.config.in_channels, *size)
    actual = predict(load(tmp_path, reference.config), latents, timesteps, context)
    assert relative_error(actual, reference(latents, timesteps, context).sample) < 1e-5


@pytest.mark.parametrize("options", [{"attention_head_dim": (2, 4)}, {"use_linear_projection": True}])
def test_heads_by_level_and_linear_projections_equal_diffusers(tmp_path: Path, options: dict[str, Any]) -> None:
    reference = reference_unet(**CONFIGS["two levels"], **options)
    reference.save_pretrained(tmp_path)
    latents, timesteps, context = inputs(4)
    actual = predict(load(tmp_path, reference.config), latents, timesteps, context)
    assert relative_error(actual, reference(latents, timesteps, context).sample) < 1e-5


@pytest.mark.parametrize("case", ["one level", "three levels", "like SD 1.5"])
def test_a_single_file_gives_the_same_bits_as_the_folder(tmp_path: Path, case: str) -> None:
    reference = reference_unet(**CONFIGS[case])
    reference.save_pretrained(tmp_path / "unet")
    folder, single = (
        load(tmp_path / "unet", reference.config),
        load(ldm_file(tmp_path / "sd.safetensors", reference), None),
    )
    latents, timesteps, context = inputs(reference.config.in_channels)
    assert torch.equal(predict(folder, latents, timesteps, context), predict(single, latents, timesteps, context))


def test_bfloat16_is_no_worse_than_diffusers(tmp_path: Path) -> None:
    reference = reference_unet(**CONFIGS["like SD 1.5"])
    reference.save_pretrained(tmp_path)
    unet = load(tmp_path, reference.config, torch.bfloat16)
    latents, timesteps, context = inputs(4)
    exact = reference(latents, timesteps, context).sample
    half = (latents.bfloat16(), timesteps, context.bfloat16())
    theirs = reference.to(torch.bfloat16)(*half).sample.float()
    assert relative_error(predict(unet, *half).float(), exact) < 1.2 * relative_error(theirs, exact)


def test_requests_can_be_batched_by_their_contexts(tmp_path: Path) -> None:
    reference = reference_unet(**CONFIGS["two levels"])
    reference.save_pretrained(tmp_path)
    unet = load(tmp_path, reference.config)
    latents, timesteps, context = inputs(4)
    rows = [unet.project_context(context[row : row + 1]) for row in range(2)]
    together = unet(latents, timesteps, stack_context(rows))
    alone = torch.cat([unet(latents[row : row + 1], timesteps[row : row + 1], rows[row]) for row in range(2)])
    assert relative_error(together, alone) < 1e-5


def test_the_name_maps_are_bijections_at_full_size() -> None:
    config = SD15 | SD15_LEVELS
    with torch.device("meta"):
        reference, unet = UNet2DConditionModel(**config), SDUNet(params_from_config(config))
    names = unet.state_dict().keys()
    diffusers, ldm = diffusers_sources(names, unet.params), ldm_sources(names, unet.params)
    assert sorted(itertools.chain(*diffusers.values())) == sorted(reference.state_dict())
    assert len(set(itertools.chain(*ldm.values()))) == len(list(itertools.chain(*ldm.values()))) == 686
    assert {own: tuple(ldm_unet_name(name, config) for name in diffusers[own]) for own in names} == ldm


def test_ldm_names_are_those_that_diffusers_converts() -> None:
    config = SD15 | SD15_LEVELS
    with torch.device("meta"):
        unet = SDUNet(params_from_config(config))
    names = unet.state_dict().keys()
    ldm, diffusers = ldm_sources(names, unet.params), diffusers_sources(names, unet.params)
    checkpoint = {name: torch.empty(0) for part in ldm.values() for name in part}
    converted = convert_ldm_unet_checkpoint(dict(checkpoint), config | {"class_embed_type": None})
    for own in names:
        assert [converted[name] for name in diffusers[own]] == [checkpoint[name] for name in ldm[own]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"missing": "conv_in.bias"}, r"1 missing: conv_in\.bias"),
        ({"unexpected": "conv_in.scale"}, r"1 unexpected: conv_in\.scale"),
        ({"mis-shaped": "conv_in.bias"}, r"1 mis-shaped: conv_in\.bias \(\[\[3\]\] instead of \[32\]\)"),
    ],
)
def test_a_faulty_key_is_named(tmp_path: Path, fault: dict[str, str], message: str) -> None:
    reference = reference_unet(**CONFIGS["one level"])
    tensors = dict(reference.state_dict())
    ((kind, name),) = fault.items()
    tensors[name] = torch.zeros(3)
    if kind == "missing":
        del tensors[name]
    with pytest.raises(CheckpointError, match=message):
        load(saved(tmp_path / "unet.safetensors", tensors), reference.config)


@pytest.mark.parametrize(
    "options",
    [
        {"act_fn": "relu"},
        {"class_embed_type": "timestep"},
        {"norm_eps": 1e-6},
        {"a_new_option": 3},
        {"layers_per_block": (1, 2)},
        {"down_block_types": ("AttnDownBlock2D",) * 4},
        {"up_block_types": ("UpBlock2D",) * 4},
        {"attention_head_dim": (8, 8)},
    ],
)
def test_an_option_of_another_architecture_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(options))):
        params_from_config(SD15 | SD15_LEVELS | options)


def test_a_config_without_a_needed_option_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lacks the option 'in_channels'"):
        params_from_config({name: value for name, value in (SD15 | SD15_LEVELS).items() if name != "in_channels"})


@pytest.mark.parametrize("case", CONFIGS)
def test_the_dimensions_of_diffusers_weights_without_a_config_are_read_from_their_shapes(
    tmp_path: Path, case: str
) -> None:
    reference = reference_unet(**CONFIGS[case])
    unet = load(saved(tmp_path / "unet.safetensors", reference.state_dict()), None)
    assert unet.params == params_from_config(reference.config)


def test_a_unet_that_is_neither_sd15_s_nor_sdxl_s_needs_its_config(tmp_path: Path) -> None:
    reference = reference_unet(**CONFIGS["one level"], use_linear_projection=True)
    with pytest.raises(CheckpointError, match="needs its config"):
        load(saved(tmp_path / "unet.safetensors", reference.state_dict()), None)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks mid_block\.attentions\.0\.proj_in\.weight; it isn't a whole"):
        load(saved(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": torch.zeros(1)}), None)


def test_half_a_single_file_is_refused(tmp_path: Path) -> None:
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}
    with pytest.raises(CheckpointError, match=r"lacks model\.diffusion_model\."):
        load(saved(tmp_path / "half.safetensors", tensors), None)
