"""The dimensions of a Stable Diffusion UNet, 1.x or XL: from diffusers' config.json or from the shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from services.modeling.weights import Checkpoint, CheckpointError

LDM_PREFIX = "model.diffusion_model."
_INPUT_STAGE = re.compile(re.escape(LDM_PREFIX) + r"input_blocks\.(\d+)\.")

# Shapes don't show these; every Stable Diffusion 1.x, or every SDXL, has them so.
_SD1_HEADS = 8
_SDXL_HEAD_WIDTH = 64
_SDXL_SIZE_WIDTH = 256
_NORM_GROUPS = 32

SIZES = 6
"""Numbers that SDXL is told of a picture's sizes: height and width of the original, crop from top and left, height and
width of the target (Podell et al. 2023, section 2.2)."""

_DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

_READ_OPTIONS = {
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "attention_head_dim",
    "cross_attention_dim",
    "norm_num_groups",
    "transformer_layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
}
# They change nothing that is computed (a linear projection is a 1x1 convolution); neither do names with an underscore.
_NEUTRAL_OPTIONS = {"dropout", "sample_size", "use_linear_projection"}
# Options that this architecture has with one value only. An option that isn't listed anywhere must be None or False.
_FIXED_OPTIONS: Mapping[str, Any] = {
    "addition_embed_type_num_heads": 64,  # of a part that only other architectures have
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


@dataclass(frozen=True, kw_only=True)
class SDUNetParams:
    """What tells one UNet of this architecture from another. The tuples run from the finest level to the coarsest.

    in_channels, out_channels: of the latent.
    widths: channels.
    blocks_per_level: residual blocks on the way down; there is one more on the way up.
    layers: transformer layers of each block; 0: the level has no transformers.
    middle_layers: those of the middle, which always has a transformer.
    heads: of each attention.
    cross_attention_dim: width of the text's features.
    norm_groups: of each GroupNorm.
    pooled_width: of the whole text's features, which are added to the time's; 0: nothing is added.
    size_width: of the features of each of the `SIZES`, which are added with them.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks_per_level: int
    layers: tuple[int, ...]
    middle_layers: int
    heads: tuple[int, ...]
    cross_attention_dim: int
    norm_groups: int
    pooled_width: int = 0
    size_width: int = 0

    @property
    def time_width(self) -> int:
        """Channels of the time features."""
        return 4 * self.widths[0]

    @property
    def added_width(self) -> int:
        """Width of what is added to the time features: the pooled text and the sizes; 0: nothing is."""
        return self.pooled_width + SIZES * self.size_width


def params_from_config(config: Mapping[str, Any]) -> SDUNetParams:
    """Reads diffusers' `unet/config.json`; raises CheckpointError for an option that this architecture doesn't have."""
    for option, value in config.items():
        _check_option(option, value)
    try:
        return _read_config(config)
    except KeyError as error:
        raise CheckpointError(f"the UNet's config lacks the option {error}") from error


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a layout has what tells the dimensions; one for each level in the tuples.

    conv_in, conv_out: the first and the last convolution.
    added: the first layer of what embeds the added conditioning.
    res_blocks: the first convolution of each level's first block.
    transformers: each level's first, whether or not there is one.
    middle: the transformer between.
    blocks_per_level: residual blocks on the way down.
    """

    conv_in: str
    conv_out: str
    added: str
    res_blocks: tuple[str, ...]
    transformers: tuple[str, ...]
    middle: str
    blocks_per_level: int


def ldm_places(checkpoint: Checkpoint) -> Places:
    """Those of the original single file."""
    stages = {int(match[1]) for match in map(_INPUT_STAGE.match, checkpoint) if match}
    downs = sorted(stage for stage in stages if f"{LDM_PREFIX}input_blocks.{stage}.0.op.weight" in checkpoint)
    period = downs[0] if downs else len(stages)  # stage 0 is the first convolution, every period-th one a downsampling
    firsts = [f"{LDM_PREFIX}input_blocks.{1 + level * period}" for level in range(len(downs) + 1)]
    return Places(
        conv_in=f"{LDM_PREFIX}input_blocks.0.0",
        conv_out=f"{LDM_PREFIX}out.2",
        added=f"{LDM_PREFIX}label_emb.0.0",
        res_blocks=tuple(f"{first}.0.in_layers.2" for first in firsts),
        transformers=tuple(f"{first}.1" for first in firsts),
        middle=f"{LDM_PREFIX}middle_block.1",
        blocks_per_level=period - 1,
    )


def diffusers_places(checkpoint: Checkpoint) -> Places:
    """Those of a file in diffusers' layout."""
    levels = range(_count(checkpoint, "down_blocks.{}.resnets.0.conv1.weight"))
    return Places(
        conv_in="conv_in",
        conv_out="conv_out",
        added="add_embedding.linear_1",
        res_blocks=tuple(f"down_blocks.{level}.resnets.0.conv1" for level in levels),
        transformers=tuple(f"down_blocks.{level}.attentions.0" for level in levels),
        middle="mid_block.attentions.0",
        blocks_per_level=_count(checkpoint, "down_blocks.0.resnets.{}.conv1.weight"),
    )


def params_from_shapes(checkpoint: Checkpoint, places: Places) -> SDUNetParams:
    """Reads the dimensions off the shapes; what they don't tell is SDXL's if there is added conditioning, else SD1's.

    Raises CheckpointError for half a UNet, and for one whose shapes are neither's.
    """
    is_xl = f"{places.added}.weight" in checkpoint
    if not is_xl and len(_shape(checkpoint, f"{places.middle}.proj_in")) == 2:
        raise CheckpointError(f"{checkpoint} holds a UNet that is neither of SD1.5 nor SDXL; it needs its config")
    widths = tuple(_shape(checkpoint, name)[0] for name in places.res_blocks)
    size_width = _SDXL_SIZE_WIDTH if is_xl else 0
    return SDUNetParams(
        in_channels=_shape(checkpoint, places.conv_in)[1],
        out_channels=_shape(checkpoint, places.conv_out)[0],
        widths=widths,
        blocks_per_level=places.blocks_per_level,
        layers=tuple(_count_layers(checkpoint, transformer) for transformer in places.transformers),
        middle_layers=_count_layers(checkpoint, places.middle),
        heads=tuple(width // _SDXL_HEAD_WIDTH if is_xl else _SD1_HEADS for width in widths),
        cross_attention_dim=_shape(checkpoint, f"{places.middle}.transformer_blocks.0.attn2.to_k")[1],
        norm_groups=_NORM_GROUPS,
        pooled_width=_shape(checkpoint, places.added)[1] - SIZES * size_width if is_xl else 0,
        size_width=size_width,
    )


def _check_option(option: str, value: Any) -> None:
    """Raises CheckpointError unless the option is read, doesn't matter, or has the one value that we compute with."""
    if option.startswith("_") or option in _READ_OPTIONS or option in _NEUTRAL_OPTIONS:
        return
    expected = _FIXED_OPTIONS.get(option)
    if value != expected and not (expected is None and value is False):
        raise CheckpointError(f"the UNet's config sets {option}={value!r}, which Stable Diffusion doesn't have")


def _read_config(config: Mapping[str, Any]) -> SDUNetParams:
    widths = tuple(config["block_out_channels"])
    layers = _per_level(config, "transformer_layers_per_block", 1)
    size_width = config.get("addition_time_embed_dim") or 0
    params = SDUNetParams(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        widths=widths,
        blocks_per_level=config["layers_per_block"],
        layers=tuple(depth if attends else 0 for depth, attends in zip(layers, _attending_levels(config), strict=True)),
        middle_layers=layers[-1],
        heads=_per_level(config, "attention_head_dim"),  # diffusers' name for the number of heads in this architecture
        cross_attention_dim=config["cross_attention_dim"],
        norm_groups=config["norm_num_groups"],
        pooled_width=(config.get("projection_class_embeddings_input_dim") or 0) - SIZES * size_width,
        size_width=size_width,
    )
    _check_added(config, params)
    _check_params(params)
    return params


def _per_level(config: Mapping[str, Any], option: str, default: int | None = None) -> tuple[int, ...]:
    """An option that is one whole number for all levels, or a list of one for each."""
    value, levels = config[option] if default is None else config.get(option, default), config["block_out_channels"]
    values = (value,) * len(levels) if isinstance(value, int) else tuple(value)
    if len(values) != len(levels) or not all(isinstance(each, int) for each in values):
        raise CheckpointError(f"the UNet's config sets {option}={value!r}; it needs a whole number for each level")
    return values


def _attending_levels(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which levels have transformers, from the types of the blocks; the decoder must mirror the encoder."""
    for option, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        if not set(config[option]) <= known.keys():
            raise CheckpointError(f"the UNet's config sets {option}={config[option]!r}; known are {sorted(known)}")
    down = tuple(_DOWN_BLOCKS[block] for block in config["down_block_types"])
    if down != tuple(_UP_BLOCKS[block] for block in reversed(config["up_block_types"])):
        raise CheckpointError("the UNet's config sets up_block_types that don't mirror its down_block_types")
    if len(down) != len(config["block_out_channels"]):
        levels = len(config["block_out_channels"])
        raise CheckpointError(f"the UNet's config has down_block_types for {len(down)} of {levels} levels")
    return down


def _check_added(config: Mapping[str, Any], params: SDUNetParams) -> None:
    """Raises CheckpointError unless what is added to the time is nothing, or SDXL's pooled text and sizes."""
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise CheckpointError(f"the UNet's config sets addition_embed_type={added!r}; only 'text_time' is known")
    widths = (params.pooled_width, params.size_width)
    if widths != (0, 0) if added is None else min(widths) <= 0:
        raise CheckpointError(
            f"the UNet's config sets addition_embed_type={added!r} with widths that do not belong to it: "
            "addition_time_embed_dim, projection_class_embeddings_input_dim"
        )


def _check_params(params: SDUNetParams) -> None:
    """Raises CheckpointError where options of the config are of a kind that we don't build."""
    for option, value in (
        ("layers_per_block", params.blocks_per_level),
        ("cross_attention_dim", params.cross_attention_dim),
        ("norm_num_groups", params.norm_groups),
    ):
        if not isinstance(value, int):
            raise CheckpointError(f"the UNet's config sets {option}={value!r}; only one whole number is known")


def _count(checkpoint: Checkpoint, template: str) -> int:
    """How many numbers from 0 on make a tensor's name of a template."""
    return len(list(takewhile(checkpoint.__contains__, (template.format(number) for number in count()))))


def _count_layers(checkpoint: Checkpoint, transformer: str) -> int:
    """Layers of a transformer; 0 where there is none."""
    return _count(checkpoint, f"{transformer}.transformer_blocks.{{}}.norm1.weight")


def _shape(checkpoint: Checkpoint, layer: str) -> tuple[int, ...]:
    """The shape of the weight of a layer that every UNet of this architecture has."""
    if f"{layer}.weight" not in checkpoint:
        raise CheckpointError(f"{checkpoint} lacks {layer}.weight; it isn't a whole Stable Diffusion UNet")
    return checkpoint.shape(f"{layer}.weight")
