"""The dimensions of a Stable Diffusion 1.x UNet: from diffusers' config.json or from a single file's shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.modeling.weights import Checkpoint, CheckpointError

LDM_PREFIX = "model.diffusion_model."
_INPUT_STAGE = re.compile(re.escape(LDM_PREFIX) + r"input_blocks\.(\d+)\.")

# Shapes don't show these two; every Stable Diffusion 1.x has them so.
_SD1_HEADS = 8
_SD1_NORM_GROUPS = 32

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
    "transformer_layers_per_block": 1,
}


@dataclass(frozen=True, kw_only=True)
class SDUNetParams:
    """What tells one UNet of this architecture from another. The tuples run from the finest level to the coarsest."""

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks_per_level: int
    attention: tuple[bool, ...]  # whether the level has transformers; the middle always has one
    heads: tuple[int, ...]
    cross_attention_dim: int
    norm_groups: int

    @property
    def time_width(self) -> int:
        """Channels of the time features."""
        return 4 * self.widths[0]


def params_from_config(config: Mapping[str, Any]) -> SDUNetParams:
    """Reads diffusers' `unet/config.json`; raises CheckpointError for an option that this architecture doesn't have."""
    for option, value in config.items():
        _check_option(option, value)
    try:
        return _read_config(config)
    except KeyError as error:
        raise CheckpointError(f"the UNet's config lacks the option {error}") from error


def params_from_ldm(checkpoint: Checkpoint) -> SDUNetParams:
    """Reads the dimensions off the shapes of the original single file's tensors."""
    stages = {int(match[1]) for match in map(_INPUT_STAGE.match, checkpoint) if match}
    downs = sorted(stage for stage in stages if _ldm(f"input_blocks.{stage}.0.op.weight") in checkpoint)
    period = downs[0] if downs else len(stages)  # stage 0 is the first convolution, every period-th one a downsampling
    firsts = [1 + level * period for level in range(len(downs) + 1)]
    return SDUNetParams(
        in_channels=_ldm_shape(checkpoint, "input_blocks.0.0.weight")[1],
        out_channels=_ldm_shape(checkpoint, "out.2.weight")[0],
        widths=tuple(_ldm_shape(checkpoint, f"input_blocks.{first}.0.in_layers.2.weight")[0] for first in firsts),
        blocks_per_level=period - 1,
        attention=tuple(_ldm(f"input_blocks.{first}.1.proj_in.weight") in checkpoint for first in firsts),
        heads=(_SD1_HEADS,) * len(firsts),
        cross_attention_dim=_ldm_shape(checkpoint, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        norm_groups=_SD1_NORM_GROUPS,
    )


def _check_option(option: str, value: Any) -> None:
    """Raises CheckpointError unless the option is read, doesn't matter, or has the one value that we compute with."""
    if option.startswith("_") or option in _READ_OPTIONS or option in _NEUTRAL_OPTIONS:
        return
    expected = _FIXED_OPTIONS.get(option)
    if value != expected and not (expected is None and value is False):
        raise CheckpointError(f"the UNet's config sets {option}={value!r}, which Stable Diffusion 1.x doesn't have")


def _read_config(config: Mapping[str, Any]) -> SDUNetParams:
    widths = tuple(config["block_out_channels"])
    attention = _attending_levels(config)
    heads = config["attention_head_dim"]  # diffusers' name for the number of heads in this architecture
    params = SDUNetParams(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        widths=widths,
        blocks_per_level=config["layers_per_block"],
        attention=attention,
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        cross_attention_dim=config["cross_attention_dim"],
        norm_groups=config["norm_num_groups"],
    )
    _check_params(params)
    return params


def _attending_levels(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which levels have transformers, from the types of the blocks; the decoder must mirror the encoder."""
    for option, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        if not set(config[option]) <= known.keys():
            raise CheckpointError(f"the UNet's config sets {option}={config[option]!r}; known are {sorted(known)}")
    down = tuple(_DOWN_BLOCKS[block] for block in config["down_block_types"])
    if down != tuple(_UP_BLOCKS[block] for block in reversed(config["up_block_types"])):
        raise CheckpointError("the UNet's config sets up_block_types that don't mirror its down_block_types")
    return down


def _check_params(params: SDUNetParams) -> None:
    """Raises CheckpointError where options of the config are of a kind that we don't build."""
    for option, value in (
        ("layers_per_block", params.blocks_per_level),
        ("cross_attention_dim", params.cross_attention_dim),
        ("norm_num_groups", params.norm_groups),
    ):
        if not isinstance(value, int):
            raise CheckpointError(f"the UNet's config sets {option}={value!r}; only one whole number is known")
    for option, per_level in (("down_block_types", params.attention), ("attention_head_dim", params.heads)):
        if len(per_level) != len(params.widths):
            raise CheckpointError(f"the UNet's config has {option} for {len(per_level)} of {len(params.widths)} levels")


def _ldm(name: str) -> str:
    return f"{LDM_PREFIX}{name}"


def _ldm_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of a tensor that every single file of this architecture has."""
    if _ldm(name) not in checkpoint:
        raise CheckpointError(f"{checkpoint} lacks {_ldm(name)}; it isn't a whole Stable Diffusion 1.x UNet")
    return checkpoint.shape(_ldm(name))
