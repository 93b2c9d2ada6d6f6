"""The dimensions of a FLUX.1 transformer: from diffusers' config.json or from the shapes of a file without one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.denoiser.models.dit_layout import Layout
from services.modeling.weights import Checkpoint, CheckpointError

_NUMBERED = re.compile(r"\.(\d+)\.")
_READ_OPTIONS = {
    "in_channels",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
}
# An option that isn't listed anywhere must be None or False; names with an underscore are notes.
_FIXED_OPTIONS: Mapping[str, Any] = {"patch_size": 1}


@dataclass(frozen=True, kw_only=True)
class FluxDiTParams:
    """What tells one FLUX.1 transformer from another."""

    in_channels: int  # of a token: the channels of 2 x 2 latent elements
    width: int
    heads: int
    double_blocks: int
    single_blocks: int
    context_width: int  # of T5's embeddings
    pooled_width: int  # of CLIP's embedding
    distilled_guidance: bool  # takes a guidance scale as an input: dev does, schnell does not
    rope_channels: tuple[int, ...]  # channels of a head that turn with the frame, the row and the column


def params_from_config(config: Mapping[str, Any]) -> FluxDiTParams:
    """Reads diffusers' `transformer/config.json`; raises CheckpointError for what this architecture doesn't have."""
    for option, value in config.items():
        _check_option(option, value, config)
    try:
        heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
        params = FluxDiTParams(
            in_channels=config["in_channels"],
            width=heads * head_width,
            heads=heads,
            double_blocks=config["num_layers"],
            single_blocks=config["num_single_layers"],
            context_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            distilled_guidance=config["guidance_embeds"],
            rope_channels=tuple(config.get("axes_dims_rope", _rope_channels(head_width))),
        )
    except KeyError as error:
        raise CheckpointError(f"the transformer's config lacks the option {error}") from error
    if sum(params.rope_channels) != head_width:
        raise CheckpointError(f"the transformer's config has axes_dims_rope that don't make {head_width} channels")
    return params


def params_from_shapes(checkpoint: Checkpoint, layout: Layout) -> FluxDiTParams:
    """Reads the dimensions off the shapes of a checkpoint in a layout.

    Raises CheckpointError for half a checkpoint.
    """

    def shape(name: str) -> tuple[int, ...]:
        found = layout.name(name)
        if found not in checkpoint:
            raise CheckpointError(f"{checkpoint} lacks {found}; it isn't a whole FLUX.1 transformer")
        return checkpoint.shape(found)

    width, in_channels = shape("image_in.weight")
    head_width = shape("double_blocks.0.image.qk_norm")[0]
    return FluxDiTParams(
        in_channels=in_channels,
        width=width,
        heads=width // head_width,
        double_blocks=_count(checkpoint, layout.name("double_blocks.0.image.to_out.weight")),
        single_blocks=_count(checkpoint, layout.name("single_blocks.0.to_out.weight")),
        context_width=shape("text_in.weight")[1],
        pooled_width=shape("vector_in.in_layer.weight")[1],
        distilled_guidance=layout.name("guidance_in.in_layer.weight") in checkpoint,
        rope_channels=_rope_channels(head_width),
    )


def _check_option(option: str, value: Any, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the option is read, or has the one value that we compute with."""
    if option.startswith("_") or option in _READ_OPTIONS:
        return
    allowed = (config.get("in_channels"), None) if option == "out_channels" else (_FIXED_OPTIONS.get(option), False)
    if value not in allowed:
        raise CheckpointError(f"the transformer's config sets {option}={value!r}, which FLUX.1 doesn't have")


def _rope_channels(head_width: int) -> tuple[int, int, int]:
    """FLUX.1's own proportions: 16, 56 and 56 of 128."""
    return head_width // 8, head_width * 7 // 16, head_width * 7 // 16


def _count(checkpoint: Checkpoint, first: str) -> int:
    """Blocks whose tensors are called like `first`, the name of one in block 0."""
    before, _, after = re.split(_NUMBERED, first, maxsplit=1)
    return sum(name.startswith(f"{before}.") and name.endswith(f".{after}") for name in checkpoint)
