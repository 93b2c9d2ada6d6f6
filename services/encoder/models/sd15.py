"""Stable Diffusion 1.5's text conditioning as the engine sees it: prompts in, `prompt_embeds` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.manifest import ModelEntry
from services.encoder.models.clip import ClipTextEncoder, clip_adaptable_network, load_clip
from services.encoder.models.clip_tokenizer import load_model_tokenizer
from services.encoder.tokenization import ClipTokenizer, TokenizedPrompt
from services.modeling.components import open_component
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import Placed, PlacedWeights, place, placement_of


class SD15Encoder:
    """CLIP-L and its tokenizer.

    Args:
        clip: the text model, placed.
        tokenizer: of the text model.
        fingerprint: of the text model's weights.
    """

    image_encoder = None

    def __init__(self, clip: Placed[ClipTextEncoder], tokenizer: ClipTokenizer, fingerprint: str) -> None:
        self._clip = clip.network
        self.weights: Sequence[PlacedWeights] = (clip.weights,)
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint
        self._device = clip.placement.device
        self.networks: Sequence[AdaptableNetwork] = [clip_adaptable_network(clip, ["text_encoder"])]

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> SD15Encoder:
        """Read the text model and the tokenizer of a manifest entry, from either layout, onto the device.

        Raises:
            CheckpointError: they are missing, damaged or do not fit each other.
        """
        source = open_component(entry, entry.encoder, "text_encoder")
        placement = placement_of(entry.encoder, device)
        clip = load_clip(source.checkpoint, source.config, device=placement.loading_device, dtype=placement.dtype)
        tokenizer = load_model_tokenizer(entry, clip.positions, clip.vocabulary_size)
        return cls(place(clip, placement, clip.weight_blocks()), tokenizer, source.checkpoint.fingerprint)

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint,
            max_tokens=self._clip.positions,
            max_clip_skip=self._clip.layers,
            default_clip_skip=1,
        )
        return ModelDescription(name=name, family="sd15", encoder=encoder)

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """The prompt's token ids and what of it did not fit."""
        return self._tokenizer(prompt)

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """`prompt_embeds` [1, L, D] of each prompt."""
        token_ids = torch.tensor([prompt.ids for prompt in prompts], device=self._device)
        return [{"prompt_embeds": embeds} for embeds in self._clip(token_ids, clip_skip).split(1)]
