"""How checkpoints name the weights of Wan's VAE: the original layout (wan/modules/vae.py), and diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.modeling.weights import Checkpoint, CheckpointError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name the weights. A name of ours is `encoder` or `decoder`, a place, a layer and a kind.

    Args:
        ends: layers outside the blocks, of the whole VAE and of either half.
        layers: those of a block.
        middle: the blocks of the coarsest resolution.
        down: the block of that number on the way down.
        up: the same on the way up, where a level has so many residual blocks.
    """

    ends: Mapping[str, str]
    layers: Mapping[str, str]
    middle: tuple[str, str, str]
    down: Callable[[int], str]
    up: Callable[[int, int], str]

    def source(self, name: str, blocks_per_level: int) -> str:
        """The tensor of the checkpoint that is our parameter `name`; so many residual blocks of the encoder a level."""
        path, kind = name.rsplit(".", 1)
        half, _, place = path.partition(".")
        if not place:
            return f"{self.ends[half]}.{kind}"
        if place in self.ends:
            return f"{half}.{self.ends[place]}.{kind}"
        blocks, number, layer = place.split(".", 2)
        return f"{half}.{self._block(blocks, int(number), blocks_per_level)}.{self.layers.get(layer, layer)}.{kind}"

    def _block(self, blocks: str, number: int, blocks_per_level: int) -> str:
        if blocks == "mid_block":
            return self.middle[number]
        return self.down(number) if blocks == "down_blocks" else self.up(number, blocks_per_level + 1)


def _diffusers_up(number: int, blocks: int) -> str:
    """diffusers counts in levels: residual blocks, then the upsampling."""
    level, place = divmod(number, blocks + 1)
    return f"up_blocks.{level}.upsamplers.0" if place == blocks else f"up_blocks.{level}.resnets.{place}"


DIFFUSERS = Layout(
    ends={name: name for name in ("quant_conv", "post_quant_conv", "conv_in", "norm_out", "conv_out")},
    layers={"conv": "resample.1", "resample.conv": "resample.1", "time_conv.conv": "time_conv"},
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    down="down_blocks.{}".format,
    up=_diffusers_up,
)
ORIGINAL = Layout(
    ends={
        "quant_conv": "conv1",
        "post_quant_conv": "conv2",
        "conv_in": "conv1",
        "norm_out": "head.0",
        "conv_out": "head.2",
    },
    layers={
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
        "conv": "resample.1",
        "resample.conv": "resample.1",
        "time_conv.conv": "time_conv",
    },
    middle=("middle.0", "middle.1", "middle.2"),
    down="downsamples.{}".format,
    up=lambda number, _: f"upsamples.{number}",
)


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The layout that `checkpoint` has. Raises CheckpointError if it holds no VAE of this architecture."""
    for layout in (ORIGINAL, DIFFUSERS):
        if layout.source("decoder.mid_block.1.to_qkv.weight", 0) in checkpoint:
            return layout
    raise CheckpointError(f"{checkpoint} holds no Wan VAE, neither in the original layout nor in diffusers'")
