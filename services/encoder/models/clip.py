"""CLIP-L, OpenAI's text model, as Stable Diffusion uses it: token ids to one embedding per token.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020. The network is `transformers.CLIPTextModel`; here are its weights and its use.

Shapes: B prompts, L tokens, D width.
"""

from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, weight_names
from services.modeling.placement import Placed
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, load_weights

HEAD_WIDTH = 64  # of every CLIP text model that was published
_OWN_PREFIX = "text_model."  # of the names in memory up to transformers 4, and in files written by it
_PREFIXES = (
    "cond_stage_model.transformer.text_model.",  # of a single file of Stable Diffusion 1.x
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.text_model.",  # of one of SDXL
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.text_model.",  # of an all-in-one file of FLUX.1
    _OWN_PREFIX,
    "",
)
_TOKEN_EMBEDDING = "embeddings.token_embedding.weight"


class ClipTextEncoder(nn.Module):
    """Token ids to prompt embeddings, for inference only."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        self.layers: int = model.config.num_hidden_layers
        self.positions: int = model.config.max_position_embeddings
        self.vocabulary_size: int = model.config.vocab_size
        self.width: int = model.config.hidden_size
        self.dtype: torch.dtype = model.dtype

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor, clip_skip: int) -> Tensor:
        """[B, L, D] after layer `layers - clip_skip + 1` (1: the last), without the final LayerNorm, as SDXL takes it.

        Raises ValueError for a layer that isn't there.
        """
        check_clip_skip(clip_skip, self.layers)
        states: tuple[Tensor, ...] = self.model(token_ids, output_hidden_states=True).hidden_states
        return states[-clip_skip]

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Prompt embeddings [B, L, D] of `token_ids` [B, L], int64, L up to `positions`.

        They are the hidden states after layer `layers - clip_skip + 1` (1: the last), through the final LayerNorm
        whichever layer it is. Padding is attended to, as in training. Raises ValueError for a layer that isn't there.
        """
        check_clip_skip(clip_skip, self.layers)
        output = self.model(token_ids, output_hidden_states=clip_skip > 1)
        if clip_skip == 1:
            embeddings: Tensor = output.last_hidden_state
            return embeddings
        normalized: Tensor = _text_model(self.model).final_layer_norm(output.hidden_states[-clip_skip])
        return normalized

    @torch.inference_mode()
    def pooled(self, token_ids: Tensor) -> Tensor:
        """One embedding [B, D] of each prompt: the last hidden state, normed, at the end of text. token_ids: [B, L]."""
        pooled: Tensor = self.model(token_ids).pooler_output
        return pooled

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the embeddings, each layer, the final norm."""
        return clip_blocks(_text_model(self.model))


def clip_blocks(text_model: Any) -> list[WeightBlock]:
    """The blocks of a text model of transformers."""
    return [
        WeightBlock("embeddings", (text_model.embeddings,)),
        *(WeightBlock(f"layers.{index}", (layer,)) for index, layer in enumerate(text_model.encoder.layers)),
        WeightBlock("final_layer_norm", (text_model.final_layer_norm,)),
    ]


def check_clip_skip(clip_skip: int, layers: int) -> None:
    """Raises ValueError for a layer that isn't there."""
    if not 1 <= clip_skip <= layers:
        raise ValueError(f"clip_skip must be from 1 to {layers}, the number of layers, got {clip_skip}")


def load_clip(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, device: torch.device, dtype: torch.dtype
) -> ClipTextEncoder:
    """The text model of a Stable Diffusion or FLUX.1 file, or of a diffusers `text_encoder` folder with its `config`.

    Raises CheckpointError for a layout or a tensor that does not fit.
    """
    prefix = _find_prefix(checkpoint)
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig.from_dict(dict(config or _config_from_shapes(checkpoint, prefix))))
    sources = {name: (prefix + name.removeprefix(_OWN_PREFIX),) for name in model.state_dict()}
    ignored = {f"{prefix}embeddings.position_ids"}  # 0, 1, 2, ... as a tensor, in files of old
    load_weights(model, checkpoint, sources, device=device, dtype=dtype, prefix=prefix, ignored=ignored)
    embeddings = _text_model(model).embeddings
    embeddings.position_ids = torch.arange(model.config.max_position_embeddings, device=device)[None]
    return ClipTextEncoder(model.eval())


def clip_adaptable_network(clip: Placed[Any], components: Sequence[str]) -> AdaptableNetwork:
    """A text model for LoRAs, which name its layers as transformers does, with or without `text_model.`."""
    names = {own: own.removeprefix("model.").removeprefix(_OWN_PREFIX) for own in weight_names(clip.network)}
    namings = [Naming({own: (prefix + name,) for own, name in names.items()}) for prefix in (_OWN_PREFIX, "")]
    return AdaptableNetwork(components, clip, namings)


def _text_model(model: CLIPTextModel) -> Any:
    """The module that holds the layers: the model itself since transformers 5, a child of it before."""
    return getattr(model, "text_model", model)


def _find_prefix(checkpoint: Checkpoint) -> str:
    for prefix in _PREFIXES:
        if prefix + _TOKEN_EMBEDDING in checkpoint:
            return prefix
    raise CheckpointError(f"{checkpoint} holds no CLIP text model: none of {[p + _TOKEN_EMBEDDING for p in _PREFIXES]}")


def _config_from_shapes(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """The config of a file without one; the activation, which no shape tells, is that of OpenAI's models."""
    vocabulary_size, width = checkpoint.shape(prefix + _TOKEN_EMBEDDING)
    if width % HEAD_WIDTH:
        raise CheckpointError(f"{checkpoint} has width {width}, no multiple of {HEAD_WIDTH}: it needs a config")
    layer_names = (f"{prefix}encoder.layers.{layer}.mlp.fc1.weight" for layer in count())
    hidden_widths = [checkpoint.shape(name)[0] for name in takewhile(checkpoint.__contains__, layer_names)]
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "intermediate_size": hidden_widths[0] if hidden_widths else 0,
        "num_hidden_layers": len(hidden_widths),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": checkpoint.shape(f"{prefix}embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu",
        "eos_token_id": vocabulary_size - 1,
    }
