"""How checkpoints name the weights of an AutoencoderKL: the original layout, and diffusers' with its two attentions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.modeling.weights import Checkpoint, CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+")
# Of a Stable Diffusion file, of an all-in-one file of FLUX.1, of a file or folder with the VAE alone.
_PREFIXES = ("first_stage_model.", "vae.", "")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name the weights. A name of ours is half, place, layer and kind: `encoder`, `mid_block.resnet_1`,
    `conv1`, `weight`; what the tables do not list is called the same.
    """

    places: Mapping[str, str]  # `{}` stands for the number of a level or of a block
    layers: Mapping[str, tuple[str, ...]]
    decoder_from_finest: bool = False  # counts the decoder's levels from the finest; ours count as they run
    prefix: str = ""

    def sources(self, name: str, levels: int) -> tuple[str, ...]:
        """The tensors of the checkpoint that make our parameter `name` in a VAE of so many levels."""
        *path, layer, kind = name.split(".")
        half, place = path[:1], self._place(path, levels)
        layers = self.layers.get(layer, (layer,))
        return tuple(self.prefix + ".".join([*half, *place, theirs, kind]) for theirs in layers)

    def _place(self, path: list[str], levels: int) -> list[str]:
        place = ".".join(path[1:])
        if not place:
            return []
        numbers = [int(number) for number in _NUMBER.findall(place)]
        if numbers and path[0] == "decoder" and self.decoder_from_finest:
            numbers[0] = levels - 1 - numbers[0]
        return [self.places[_NUMBER.sub("{}", place)].format(*numbers)]


DIFFUSERS = Layout(
    places={
        "down_blocks.{}.resnets.{}": "down_blocks.{}.resnets.{}",
        "down_blocks.{}.downsample": "down_blocks.{}.downsamplers.0",
        "up_blocks.{}.resnets.{}": "up_blocks.{}.resnets.{}",
        "up_blocks.{}.upsample": "up_blocks.{}.upsamplers.0",
        "mid_block.resnet_1": "mid_block.resnets.0",
        "mid_block.attention": "mid_block.attentions.0",
        "mid_block.resnet_2": "mid_block.resnets.1",
    },
    layers={"norm_out": ("conv_norm_out",), "to_qkv": ("to_q", "to_k", "to_v"), "to_out": ("to_out.0",)},
)
DIFFUSERS_BEFORE_0_17 = replace(
    DIFFUSERS, layers={**DIFFUSERS.layers, "to_qkv": ("query", "key", "value"), "to_out": ("proj_attn",)}
)
ORIGINAL = Layout(
    places={
        "down_blocks.{}.resnets.{}": "down.{}.block.{}",
        "down_blocks.{}.downsample": "down.{}.downsample",
        "up_blocks.{}.resnets.{}": "up.{}.block.{}",
        "up_blocks.{}.upsample": "up.{}.upsample",
        "mid_block.resnet_1": "mid.block_1",
        "mid_block.attention": "mid.attn_1",
        "mid_block.resnet_2": "mid.block_2",
    },
    layers={
        "conv_shortcut": ("nin_shortcut",),
        "group_norm": ("norm",),
        "to_qkv": ("q", "k", "v"),
        "to_out": ("proj_out",),
    },
    decoder_from_finest=True,
)
LAYOUTS = (DIFFUSERS, DIFFUSERS_BEFORE_0_17, ORIGINAL)


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The layout, with its prefix, that `checkpoint` has. Raises CheckpointError if it holds no AutoencoderKL."""
    for prefix in _PREFIXES:
        for layout in (replace(layout, prefix=prefix) for layout in LAYOUTS):
            if checkpoint.keys() >= set(layout.sources("decoder.mid_block.attention.to_qkv.weight", levels=1)):
                return layout
    raise CheckpointError(
        f"{checkpoint} holds no AutoencoderKL in a known layout: the attention of the decoder is neither "
        + " nor ".join(layout.sources("decoder.mid_block.attention.to_qkv.weight", levels=1)[0] for layout in LAYOUTS)
    )
