"""The encoders of T5, version 1.1, as FLUX.1 uses it, and of UMT5, as Wan does: token ids to one embedding per token.

Papers: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
https://arxiv.org/abs/1910.10683; Chung et al. 2023, "UniMax", https://arxiv.org/abs/2304.09151 (UMT5, whose blocks have
relative positions of their own). The networks are `transformers`'; here are their weights and their use.

Shapes: B prompts, L tokens, D width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, weight_names
from services.modeling.placement import Placed
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, Source, load_weights

_EMBEDDING = "embed_tokens.weight"
_POSITIONS = "block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
# Copies of the embedding, and the tokenizer that ComfyUI's files of UMT5 hold.
_IGNORED = ("shared.weight", "encoder.embed_tokens.weight", "spiece_model")
_BLOCK = re.compile(r"block\.(\d+)\.(.*)")
_LAYERS_OF_LLAMA_CPP = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
_LAYERS_OF_WAN = {
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.1.layer_norm": "norm2",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name the weights.

    embedding: of the tokens; copies of it, which other names of a file may hold, are left alone.
    prefix: of all names.
    block: `{}` is the number of a block.
    layers: of a block, by transformers' names; what is missing is called the same.
    final_norm: after the last block.
    """

    embedding: str
    prefix: str = ""
    block: str = "encoder.block.{}"
    layers: Mapping[str, str] = field(default_factory=dict)
    final_norm: str = "encoder.final_layer_norm"

    def source(self, own: str) -> str:
        """The tensor of the checkpoint that is the encoder's parameter `own`."""
        if own == _EMBEDDING:
            return self.prefix + self.embedding
        found = _BLOCK.fullmatch(own)
        if found is None:
            return f"{self.prefix}{self.final_norm}.{own.rpartition('.')[2]}"
        layer, _, kind = found[2].rpartition(".")
        return f"{self.prefix}{self.block.format(found[1])}.{self.layers.get(layer, layer)}.{kind}"


LAYOUTS = (
    Layout(embedding="shared.weight", prefix="text_encoders.t5xxl.transformer."),  # of ComfyUI's all-in-one files
    Layout(embedding="shared.weight"),
    Layout(embedding="encoder.embed_tokens.weight"),
    Layout(
        embedding="token_embd.weight", block="enc.blk.{}", layers=_LAYERS_OF_LLAMA_CPP, final_norm="enc.output_norm"
    ),
    Layout(embedding="token_embedding.weight", block="blocks.{}", layers=_LAYERS_OF_WAN, final_norm="norm"),
)


class T5TextEncoder(nn.Module):
    """Token ids to prompt embeddings, for inference only."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.stack = stack
        self.width: int = stack.config.d_model
        self.vocabulary_size: int = stack.config.vocab_size

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prompt embeddings [B, L, D] of `token_ids` [B, L], int64.

        mask: [B, L], 1 for what is attended to; without one padding is, too, as FLUX.1 was trained.
        """
        embeddings: Tensor = self.stack(input_ids=token_ids, attention_mask=mask).last_hidden_state
        return embeddings

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the embedding, each block, the final norm."""
        return [
            WeightBlock("embed_tokens", (self.stack.embed_tokens,)),
            *(WeightBlock(f"block.{index}", (block,)) for index, block in enumerate(self.stack.block)),
            WeightBlock("final_layer_norm", (self.stack.final_layer_norm,)),
        ]


def load_t5(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    float8: bool = False,
) -> T5TextEncoder:
    """The encoder of a file of its own, of an all-in-one file, or of a folder with its `config`.

    Raises CheckpointError for a layout or a tensor that does not fit.
    """
    layout = _find_layout(checkpoint)
    options = dict(config or _config_from_shapes(checkpoint, layout))
    with torch.device("meta"):
        # Of its two names for one embedding only the stack's is loaded.
        stack = _network(options, is_umt5=layout.source(_POSITIONS.format(1)) in checkpoint).encoder
    sources = {name: (layout.source(name),) for name in stack.state_dict()}
    load_weights(
        stack,
        checkpoint,
        sources,
        device=device,
        dtype=dtype,
        prefix=layout.prefix,
        ignored={layout.prefix + name for name in _IGNORED},
        float8=float8,
    )
    if dtype == torch.float16:
        _keep_wide_sums(stack)
    return T5TextEncoder(stack.eval())


def _network(options: Mapping[str, Any], *, is_umt5: bool) -> Any:
    if is_umt5:
        return UMT5EncoderModel(UMT5Config.from_dict(dict(options)))
    return T5EncoderModel(T5Config.from_dict(dict(options)))


def t5_adaptable_network(t5: Placed[T5TextEncoder], components: Sequence[str]) -> AdaptableNetwork:
    """The encoder for LoRAs, which name its layers as transformers does."""
    sources: dict[str, tuple[Source, ...]] = {
        own: (own.replace("stack.", "encoder.", 1),) for own in weight_names(t5.network)
    }
    return AdaptableNetwork(components, t5, [Naming(sources)])


def _keep_wide_sums(stack: nn.Module) -> None:
    """Brings the last product of each block to float32, as transformers does: in float16 it overflows."""
    for name, module in stack.named_modules():
        if name.endswith(".wo"):
            module.float()


def _find_layout(checkpoint: Checkpoint) -> Layout:
    for layout in LAYOUTS:
        if checkpoint.keys() >= {layout.source(_EMBEDDING), layout.source("final_layer_norm.weight")}:
            return layout
    names = [layout.source(_EMBEDDING) for layout in LAYOUTS]
    raise CheckpointError(f"{checkpoint} holds no T5 encoder: none of {', '.join(names)}")


def _config_from_shapes(checkpoint: Checkpoint, layout: Layout) -> dict[str, Any]:
    """The config of a file without one; what no shape tells is as in T5 1.1.

    Raises CheckpointError for half an encoder.
    """

    def shape(own: str) -> tuple[int, ...]:
        if layout.source(own) not in checkpoint:
            raise CheckpointError(f"{checkpoint} lacks {layout.source(own)}; it isn't a whole encoder of T5 1.1")
        return checkpoint.shape(layout.source(own))

    vocabulary_size, width = shape(_EMBEDDING)
    buckets, heads = shape(_POSITIONS.format(0))
    norms = (layout.source(f"block.{block}.layer.0.layer_norm.weight") for block in count())
    return {
        "vocab_size": vocabulary_size,
        "d_model": width,
        "d_kv": shape("block.0.layer.0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape("block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": len(list(takewhile(checkpoint.__contains__, norms))),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }
