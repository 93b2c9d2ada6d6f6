"""CLIP-G, the larger text model of SDXL: token ids to one embedding per token and one of the whole text.

Reference code: mlfoundations/open_clip `src/open_clip/transformer.py` (ViT-bigG-14). The network is
`transformers.CLIPTextModelWithProjection`; here are its weights, in transformers' layout and in open_clip's.

Shapes: B prompts, L tokens, D width, P width of the projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from services.encoder.models.clip import HEAD_WIDTH, check_clip_skip, clip_blocks
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, Piece, Source, load_weights

# transformers takes it to mean: the text ends at its highest token id, as open_clip does.
_END_IS_HIGHEST_ID = 2


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a layout has the tensors that tell the sizes; the axis of the projection is that of P."""

    prefix: str
    token_embedding: str
    position_embedding: str
    hidden: str
    projection: str
    projection_axis: int


_OPEN_CLIP = _Layout(
    prefix="conditioner.embedders.1.model.",
    token_embedding="token_embedding.weight",
    position_embedding="positional_embedding",
    hidden="transformer.resblocks.{}.mlp.c_fc.weight",
    projection="text_projection",
    projection_axis=1,
)
_TRANSFORMERS = _Layout(
    prefix="",
    token_embedding="text_model.embeddings.token_embedding.weight",
    position_embedding="text_model.embeddings.position_embedding.weight",
    hidden="text_model.encoder.layers.{}.mlp.fc1.weight",
    projection="text_projection.weight",
    projection_axis=0,
)

# Our layers' names and open_clip's.
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


class ClipGTextEncoder(nn.Module):
    """Token ids to prompt embeddings and the pooled prompt, for inference only."""

    def __init__(self, model: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.model = model
        self.layers: int = model.config.num_hidden_layers
        self.positions: int = model.config.max_position_embeddings
        self.vocabulary_size: int = model.config.vocab_size
        self.width: int = model.config.hidden_size
        self.projection_width: int = model.config.projection_dim
        self.dtype: torch.dtype = model.dtype

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, D] and the pooled text [B, P] of `token_ids` [B, L], int64, L up to `positions`.

        The hidden states are those after layer `layers - clip_skip + 1` (1: the last), without the final LayerNorm; the
        pooled text is always the projection of the last layer's, normed, at the end of the text. Raises ValueError for
        a layer that isn't there.
        """
        check_clip_skip(clip_skip, self.layers)
        output = self.model(token_ids, output_hidden_states=True)
        return output.hidden_states[-clip_skip], output.text_embeds

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the text model's, then the projection."""
        projection = WeightBlock("text_projection", (self.model.text_projection,))
        return [*clip_blocks(self.model.text_model), projection]


def load_clip_g(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, device: torch.device, dtype: torch.dtype
) -> ClipGTextEncoder:
    """The text model of an SDXL file, or of a diffusers `text_encoder_2` folder with its `config`.

    Raises CheckpointError for a layout or a tensor that does not fit.
    """
    layout = _find_layout(checkpoint)
    with torch.device("meta"):
        given = config or _config_from_shapes(checkpoint, layout)
        model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(given)))
    prefix, layers = layout.prefix, model.config.num_hidden_layers
    sources: Mapping[str, tuple[Source, ...]] = {name: (name,) for name in model.state_dict()}
    if layout is _OPEN_CLIP:
        sources = _open_clip_sources(prefix, layers)
    ignored = {f"{prefix}logit_scale", f"{prefix}text_model.embeddings.position_ids"}
    load_weights(model, checkpoint, sources, device=device, dtype=dtype, prefix=prefix, ignored=ignored)
    embeddings = model.text_model.embeddings
    embeddings.position_ids = torch.arange(model.config.max_position_embeddings, device=device)[None]
    return ClipGTextEncoder(model.eval())


def _find_layout(checkpoint: Checkpoint) -> _Layout:
    for layout in (_OPEN_CLIP, _TRANSFORMERS):
        told = (layout.token_embedding, layout.position_embedding, layout.projection)
        if all(layout.prefix + name in checkpoint for name in told):
            return layout
    raise CheckpointError(
        f"{checkpoint} holds no whole CLIP-G text model: neither {_OPEN_CLIP.prefix}{_OPEN_CLIP.projection} nor "
        f"{_TRANSFORMERS.projection} with their embeddings"
    )


def _config_from_shapes(checkpoint: Checkpoint, layout: _Layout) -> dict[str, Any]:
    """The config of a file without one; the activation, which no shape tells, is that of open_clip's models."""

    def shape(name: str) -> tuple[int, ...]:
        return checkpoint.shape(layout.prefix + name)

    vocabulary_size, width = shape(layout.token_embedding)
    if width % HEAD_WIDTH:
        raise CheckpointError(f"{checkpoint} has width {width}, no multiple of {HEAD_WIDTH}: it needs a config")
    names = (layout.prefix + layout.hidden.format(layer) for layer in count())
    hidden_widths = [checkpoint.shape(name)[0] for name in takewhile(checkpoint.__contains__, names)]
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "intermediate_size": hidden_widths[0] if hidden_widths else 0,
        "num_hidden_layers": len(hidden_widths),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": shape(layout.position_embedding)[0],
        "projection_dim": shape(layout.projection)[layout.projection_axis],
        "hidden_act": "gelu",
        "eos_token_id": _END_IS_HIGHEST_ID,
    }


def _open_clip_sources(prefix: str, layers: int) -> dict[str, tuple[Source, ...]]:
    """For each of transformers' names what makes it in open_clip's layout, where q, k and v are one tensor."""
    found: dict[str, tuple[Source, ...]] = {ours: (prefix + theirs,) for ours, theirs in _OPEN_CLIP_ENDS.items()}
    found["text_projection.weight"] = (Piece(f"{prefix}text_projection", transposed=True),)
    for index in range(layers):
        ours, theirs = f"text_model.encoder.layers.{index}", f"{prefix}transformer.resblocks.{index}"
        for kind in ("weight", "bias"):
            for our_layer, their_layer in _OPEN_CLIP_LAYER.items():
                found[f"{ours}.{our_layer}.{kind}"] = (f"{theirs}.{their_layer}.{kind}",)
            for part, name in enumerate("qkv"):
                piece = Piece(f"{theirs}.attn.in_proj_{kind}", index=part, parts=3)
                found[f"{ours}.self_attn.{name}_proj.{kind}"] = (piece,)
    return found
