"""Wan's text conditioning as the engine sees it: prompts in, `prompt_embeds` out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import ftfy
import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.manifest import ModelEntry
from services.encoder.models.t5 import T5TextEncoder, load_t5, t5_adaptable_network
from services.encoder.t5_tokenization import T5Tokenizer, load_t5_tokenizer
from services.encoder.tokenization import TokenizedPrompt
from services.modeling.components import open_component
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import Placed, PlacedWeights, place, placement_of

UMT5_TOKENS = 512


class WanEncoder:
    """UMT5 and its tokenizer.

    Args:
        umt5: the text model, placed.
        tokenizer: of the text model.
        fingerprint: of the text model's weights.
    """

    def __init__(self, umt5: Placed[T5TextEncoder], tokenizer: T5Tokenizer, fingerprint: str) -> None:
        self._umt5 = umt5.network
        self.weights: Sequence[PlacedWeights] = (umt5.weights,)
        self.networks: Sequence[AdaptableNetwork] = (t5_adaptable_network(umt5, ["text_encoder"]),)
        self._device = umt5.placement.device
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> WanEncoder:
        """Read the text model and the tokenizer of a manifest entry, from any layout, onto the device.

        Raises:
            CheckpointError: they are missing, damaged or do not fit each other.
        """
        part = entry.encoder.part("umt5")
        source = open_component(entry, part, "text_encoder")
        placement = placement_of(part, device, torch.bfloat16)
        umt5 = load_t5(
            source.checkpoint,
            source.config,
            device=placement.loading_device,
            dtype=placement.dtype,
            float8=placement.float8,
        )
        folder = Path(entry.tokenizer) if entry.tokenizer else entry.paths[0] / "tokenizer"
        try:
            tokenizer = load_t5_tokenizer(folder, UMT5_TOKENS)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(
                f"model {entry.name!r}: {error}; name the folder google/umt5-xxl of the Wan repository, or the "
                "tokenizer/ of its diffusers layout, with 'tokenizer:' in the manifest"
            ) from error
        if tokenizer.vocabulary_size > umt5.vocabulary_size:
            raise CheckpointError(
                f"model {entry.name!r}: the tokenizer in {folder} has {tokenizer.vocabulary_size} tokens, the text "
                f"model {umt5.vocabulary_size}: name the model's own"
            )
        return cls(place(umt5, placement, umt5.weight_blocks()), tokenizer, source.checkpoint.fingerprint)

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint, max_tokens=UMT5_TOKENS, max_clip_skip=1, default_clip_skip=1
        )
        return ModelDescription(name=name, family="wan", encoder=encoder)

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """The token ids of the cleaned prompt and what of it did not fit."""
        return self._tokenizer(cleaned(prompt))

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """`prompt_embeds` [1, 512, D] of each prompt, zeros after its end.

        What comes after the end of a prompt is not attended to, so only as many tokens as the longest of them has are
        computed.
        """
        lengths = torch.tensor([prompt.kept + prompt.special_tokens for prompt in prompts], device=self._device)
        token_ids = torch.tensor([prompt.ids for prompt in prompts], device=self._device)[:, : int(lengths.max())]
        mask = torch.arange(token_ids.shape[1], device=self._device) < lengths[:, None]
        embeds = self._umt5(token_ids, mask.long()) * mask[..., None]
        padded = F.pad(embeds, (0, 0, 0, UMT5_TOKENS - embeds.shape[1]))
        return [{"prompt_embeds": row[None]} for row in padded]


def cleaned(prompt: str) -> str:
    """The prompt as Wan was trained on it: mended text, HTML's entities written out (twice), single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
