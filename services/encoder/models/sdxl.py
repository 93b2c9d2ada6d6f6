"""SDXL's text conditioning as the engine sees it: prompts in, `prompt_embeds` and `pooled_prompt_embeds` out.

Paper: Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.1. Shapes: B prompts, L tokens, D width of both
text models together, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.fingerprints import joint_fingerprint
from services.common.manifest import ModelEntry
from services.encoder.models.clip import ClipTextEncoder, clip_adaptable_network, load_clip
from services.encoder.models.clip_g import ClipGTextEncoder, load_clip_g
from services.encoder.models.clip_tokenizer import load_model_tokenizer
from services.encoder.tokenization import ClipTokenizer, TokenizedPrompt
from services.modeling.components import open_component, read_json
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import Placed, PlacedWeights, place, placement_of

_PENULTIMATE = 2  # the layer that SDXL was trained with
_CLIP_G_PADDING = "!"


class SDXLEncoder:
    """CLIP-L and CLIP-G side by side, and the tokenizer that both use.

    Args:
        clip_l: the smaller text model, placed.
        clip_g: the larger one.
        tokenizer: of both; CLIP-G pads with "!".
        fingerprint: of the weights of both.
        zero_empty_negative: stand for an empty negative prompt by zeros, as SDXL was trained.
    """

    image_encoder = None

    def __init__(
        self,
        clip_l: Placed[ClipTextEncoder],
        clip_g: Placed[ClipGTextEncoder],
        tokenizer: ClipTokenizer,
        fingerprint: str,
        *,
        zero_empty_negative: bool,
    ) -> None:
        self._clip_l, self._clip_g = clip_l.network, clip_g.network
        self.weights: Sequence[PlacedWeights] = (clip_l.weights, clip_g.weights)
        self._device = clip_l.placement.device
        self._tokenizer = tokenizer
        self._clip_g_padding = tokenizer.token_id(_CLIP_G_PADDING)
        self.fingerprint = fingerprint
        self._zero_empty_negative = zero_empty_negative
        self.networks: Sequence[AdaptableNetwork] = [
            clip_adaptable_network(clip_l, ["text_encoder"]),
            clip_adaptable_network(clip_g, ["text_encoder_2"]),
        ]

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> SDXLEncoder:
        """Read both text models and the tokenizer of a manifest entry, from either layout, onto the device.

        Raises:
            CheckpointError: they are missing, damaged or do not fit each other.
        """
        part_l, part_g = entry.encoder.part("clip_l"), entry.encoder.part("clip_g")
        source_l = open_component(entry, part_l, "text_encoder")
        source_g = open_component(entry, part_g, "text_encoder_2")
        place_l, place_g = placement_of(part_l, device), placement_of(part_g, device)
        clip_l = load_clip(source_l.checkpoint, source_l.config, device=place_l.loading_device, dtype=place_l.dtype)
        clip_g = load_clip_g(source_g.checkpoint, source_g.config, device=place_g.loading_device, dtype=place_g.dtype)
        if clip_l.positions != clip_g.positions:
            raise CheckpointError(
                f"model {entry.name!r}: CLIP-L takes {clip_l.positions} tokens and CLIP-G {clip_g.positions}: "
                "they are not of one model"
            )
        index = read_json(entry.paths[0] / "model_index.json") or {}
        return cls(
            place(clip_l, place_l, clip_l.weight_blocks()),
            place(clip_g, place_g, clip_g.weight_blocks()),
            load_model_tokenizer(entry, clip_l.positions, min(clip_l.vocabulary_size, clip_g.vocabulary_size)),
            joint_fingerprint([source_l.checkpoint.fingerprint, source_g.checkpoint.fingerprint]),
            zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", True)),
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint,
            max_tokens=self._clip_l.positions,
            max_clip_skip=min(self._clip_l.layers, self._clip_g.layers),
            default_clip_skip=_PENULTIMATE,
        )
        return ModelDescription(name=name, family="sdxl", encoder=encoder)

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """The prompt's token ids, which are CLIP-L's, and what of it did not fit."""
        if negative and not prompt and self._zero_empty_negative:
            return TokenizedPrompt(ids=(), tokens=0, kept=0, cut_off="")
        return self._tokenizer(prompt)

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """`prompt_embeds` [1, L, D] and `pooled_prompt_embeds` [1, P] of each prompt.

        They are the hidden states of both models, counted from the last layer, without the final norm, side by side;
        and CLIP-G's projection of the whole text.
        """
        given = [prompt for prompt in prompts if prompt.ids]
        encoded = iter(self._encode(given, clip_skip) if given else [])
        return [next(encoded) if prompt.ids else self._zeros() for prompt in prompts]

    def _encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        ids_l = torch.tensor([prompt.ids for prompt in prompts], device=self._device)
        ids_g = torch.tensor([prompt.padded_with(self._clip_g_padding) for prompt in prompts], device=self._device)
        states_l, (states_g, pooled) = self._clip_l.hidden_states(ids_l, clip_skip), self._clip_g(ids_g, clip_skip)
        embeds = torch.cat([states_l, states_g.to(states_l.dtype)], dim=-1)
        return [_named(*tensors) for tensors in zip(torch.split(embeds, 1), torch.split(pooled, 1), strict=True)]

    def _zeros(self) -> Mapping[str, Tensor]:
        widths, dtype = (self._clip_l.width, self._clip_g.width), self._clip_l.dtype
        embeds = torch.zeros(1, self._clip_l.positions, sum(widths), dtype=dtype, device=self._device)
        pooled = torch.zeros(1, self._clip_g.projection_width, dtype=self._clip_g.dtype, device=self._device)
        return _named(embeds, pooled)


def _named(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Mapping[str, Tensor]:
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
