"""Wan's conditioning as the engine sees it: prompts in, `prompt_embeds` out; and for some models pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ftfy
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE
from services.common.fingerprints import joint_fingerprint
from services.common.manifest import ModelEntry, Part
from services.encoder.models.clip_vision import ClipImageEncoder, load_clip_vision
from services.encoder.models.t5 import T5TextEncoder, load_t5, t5_adaptable_network
from services.encoder.t5_tokenization import T5Tokenizer, load_t5_tokenizer
from services.encoder.tokenization import TokenizedPrompt
from services.modeling.components import open_component
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import Placed, PlacedWeights, place, placement_of

UMT5_TOKENS = 512
_IMAGE_ENCODER = "image_encoder"  # the part of the manifest, and diffusers' folder


class WanImageEncoder:
    """CLIP's image encoder: pictures in, `image_embeds` out.

    Args:
        clip: the network, placed.
        fingerprint: of its weights.
    """

    def __init__(self, clip: Placed[ClipImageEncoder], fingerprint: str) -> None:
        self._clip = clip.network
        self._device = clip.placement.device
        self.weights = clip.weights
        self.fingerprint = fingerprint

    def pixels(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the network sees of a picture [H, W, 3]: [1, 3, S, S], on the CPU."""
        return self._clip.pixels(picture)

    def encode(self, pixels: Sequence[Tensor]) -> list[Mapping[str, Tensor]]:
        """`image_embeds` [1, P, D] of each picture."""
        rows = torch.split(self._clip(torch.cat(list(pixels)).to(self._device)), 1)
        return [{"image_embeds": row} for row in rows]


class WanEncoder:
    """UMT5 and its tokenizer, and an encoder of pictures for models that are led through keyframes.

    Args:
        umt5: the text model, placed.
        tokenizer: of the text model.
        image_encoder: of pictures; None: the model takes none.
        fingerprint: of the text model's weights.
    """

    def __init__(
        self,
        umt5: Placed[T5TextEncoder],
        tokenizer: T5Tokenizer,
        image_encoder: WanImageEncoder | None,
        fingerprint: str,
    ) -> None:
        self._umt5 = umt5.network
        self.image_encoder = image_encoder
        self.weights: Sequence[PlacedWeights] = (umt5.weights, *([image_encoder.weights] if image_encoder else []))
        self.networks: Sequence[AdaptableNetwork] = (t5_adaptable_network(umt5, ["text_encoder"]),)
        self._device = umt5.placement.device
        self._tokenizer = tokenizer
        self.fingerprint = joint_fingerprint([fingerprint, *([image_encoder.fingerprint] if image_encoder else [])])

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> WanEncoder:
        """Read the text model, the tokenizer and, where there is one, the image encoder of a manifest entry, from any
        layout, onto the device.

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
        return cls(
            place(umt5, placement, umt5.weight_blocks()),
            _load_tokenizer(entry, umt5.vocabulary_size),
            _load_image_encoder(entry, device),
            source.checkpoint.fingerprint,
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        encoder = EncoderDescription(
            fingerprint=self.fingerprint,
            max_tokens=UMT5_TOKENS,
            max_clip_skip=1,
            default_clip_skip=1,
            inputs=[MEDIA_ROLE_IMAGE] if self.image_encoder else [],
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


def _load_tokenizer(entry: ModelEntry, vocabulary_size: int) -> T5Tokenizer:
    """The tokenizer that the manifest names, or the model folder's own.

    Raises:
        CheckpointError: there is none, or it is damaged or of more tokens than the text model knows.
    """
    folder = Path(entry.tokenizer) if entry.tokenizer else entry.paths[0] / "tokenizer"
    try:
        tokenizer = load_t5_tokenizer(folder, UMT5_TOKENS)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"model {entry.name!r}: {error}; name the folder google/umt5-xxl of the Wan repository, or the tokenizer/ "
            "of its diffusers layout, with 'tokenizer:' in the manifest"
        ) from error
    if tokenizer.vocabulary_size > vocabulary_size:
        raise CheckpointError(
            f"model {entry.name!r}: the tokenizer in {folder} has {tokenizer.vocabulary_size} tokens, the text model "
            f"{vocabulary_size}: name the model's own"
        )
    return tokenizer


def _load_image_encoder(entry: ModelEntry, device: torch.device) -> WanImageEncoder | None:
    """CLIP's image encoder where the manifest names one, or the model's folder has one; models of words have none.

    Its half precision is float16, as in Wan's own code.

    Raises:
        CheckpointError: it is damaged or of no known layout.
    """
    named = entry.encoder.parts.get(_IMAGE_ENCODER, Part()).path
    if not named and not (entry.paths and (entry.paths[0] / _IMAGE_ENCODER).is_dir()):
        return None
    part = replace(entry.encoder.part(_IMAGE_ENCODER), path=named)
    source = open_component(entry, part, _IMAGE_ENCODER)
    placement = placement_of(part, device)
    clip = load_clip_vision(source.checkpoint, source.config, device=placement.loading_device, dtype=placement.dtype)
    return WanImageEncoder(place(clip, placement, clip.weight_blocks()), source.checkpoint.fingerprint)


def cleaned(prompt: str) -> str:
    """The prompt as Wan was trained on it: mended text, HTML's entities written out (twice), single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
