"""The dimensions of a Wan transformer: from diffusers' config.json or from the shapes of a file without one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.denoiser.models.dit_layout import Layout
from services.modeling.weights import Checkpoint, CheckpointError

PATCH = (1, 2, 2)  # frames, rows and columns of latent elements that make a token
_HEAD_WIDTH = 128  # of every published Wan; no shape shows it
_READ_OPTIONS = {
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "ffn_dim",
    "num_layers",
    "image_dim",
    "added_kv_proj_dim",
    "pos_embed_seq_len",
}
# Options that this architecture has with one value only. An option that isn't listed anywhere must be None or False.
_FIXED_OPTIONS: Mapping[str, Any] = {
    "patch_size": list(PATCH),
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}


@dataclass(frozen=True, kw_only=True)
class WanDiTParams:
    """What tells one Wan transformer from another."""

    in_channels: int  # of the latent, and of the picture's latent and mask where it starts from one
    out_channels: int  # of the latent
    width: int
    heads: int
    mlp_width: int
    blocks: int
    text_width: int  # of UMT5's embeddings
    image_width: int | None  # of CLIP's embeddings of a picture; None: takes none
    image_positions: int | None  # tokens of CLIP with positions of their own (first and last frame); None: without


def params_from_config(config: Mapping[str, Any]) -> WanDiTParams:
    """Reads diffusers' `transformer/config.json`; raises CheckpointError for what this architecture doesn't have."""
    for option, value in config.items():
        _check_option(option, value)
    try:
        heads = config["num_attention_heads"]
        return WanDiTParams(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            width=heads * config["attention_head_dim"],
            heads=heads,
            mlp_width=config["ffn_dim"],
            blocks=config["num_layers"],
            text_width=config["text_dim"],
            image_width=config.get("image_dim"),
            image_positions=config.get("pos_embed_seq_len"),
        )
    except KeyError as error:
        raise CheckpointError(f"the transformer's config lacks the option {error}") from error


def params_from_shapes(checkpoint: Checkpoint, layout: Layout) -> WanDiTParams:
    """Reads the dimensions off the shapes of a checkpoint in a layout.

    Raises CheckpointError for half a checkpoint.
    """

    def shape(name: str) -> tuple[int, ...] | None:
        found = layout.name(name)
        return checkpoint.shape(found) if found in checkpoint else None

    def needed(name: str) -> tuple[int, ...]:
        found = shape(name)
        if found is None:
            raise CheckpointError(f"{checkpoint} lacks {layout.name(name)}; it isn't a whole Wan transformer")
        return found

    width, in_channels = needed("patch_in.weight")[:2]
    image, positions = shape("image_in.in_layer.weight"), shape("image_in.positions")
    return WanDiTParams(
        in_channels=in_channels,
        out_channels=needed("head.proj_out.weight")[0] // (PATCH[0] * PATCH[1] * PATCH[2]),
        width=width,
        heads=width // _HEAD_WIDTH,
        mlp_width=needed("blocks.0.mlp_in.weight")[0],
        blocks=sum(layout.name(f"blocks.{number}.to_out.weight") in checkpoint for number in range(len(checkpoint))),
        text_width=needed("text_in.in_layer.weight")[1],
        image_width=image[1] if image else None,
        image_positions=positions[-2] if positions else None,
    )


def _check_option(option: str, value: Any) -> None:
    """Raises CheckpointError unless the option is read, or has the one value that we compute with."""
    if option.startswith("_") or option in _READ_OPTIONS:
        return
    value = list(value) if isinstance(value, tuple) else value
    if value != _FIXED_OPTIONS.get(option) and not (option not in _FIXED_OPTIONS and value is False):
        raise CheckpointError(f"the transformer's config sets {option}={value!r}, which Wan doesn't have")
