"""Which encoder serves which model family. A new family is a file in models/ and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import ModelDescription
from services.common.manifest import ModelEntry
from services.encoder.models.flux import FluxEncoder
from services.encoder.models.flux_without_text import FluxWithoutText
from services.encoder.models.sd15 import SD15Encoder
from services.encoder.models.sdxl import SDXLEncoder
from services.encoder.models.wan import WanEncoder
from services.encoder.tokenization import TokenizedPrompt
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.placement import PlacedWeights


class ImageEncoder(Protocol):
    """What the engine needs to condition a model on pictures."""

    def pixels(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the network sees of a picture [H, W, 3]; on the CPU."""
        ...

    def encode(self, pixels: Sequence[Tensor]) -> list[Mapping[str, Tensor]]:
        """Named conditioning tensors [1, tokens, width] of each picture; those of several are joined in their order."""
        ...


class PromptEncoder(Protocol):
    """What the engine needs of a model family."""

    fingerprint: str
    weights: Sequence[PlacedWeights]
    networks: Sequence[AdaptableNetwork]

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """Of pictures that condition the model beside the text; None: it takes none."""
        ...

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        ...

    def tokenize(self, prompt: str, *, negative: bool = False) -> TokenizedPrompt:
        """The prompt's token ids and what of it did not fit; zeros may stand for an empty negative prompt."""
        ...

    def encode(self, prompts: Sequence[TokenizedPrompt], clip_skip: int) -> list[Mapping[str, Tensor]]:
        """Named conditioning tensors of each prompt, batch axis 1; one with token ids is a row of the networks."""
        ...


Loader = Callable[[ModelEntry, torch.device], PromptEncoder]


def _load_flux(entry: ModelEntry, device: torch.device) -> PromptEncoder:
    return FluxEncoder.load(entry, device) if entry.load_text_encoder else FluxWithoutText()


def _with_text(load: Loader) -> Loader:
    """The loader of a family that can't do without text."""

    def checked(entry: ModelEntry, device: torch.device) -> PromptEncoder:
        if not entry.load_text_encoder:
            raise CheckpointError(
                f"model {entry.name!r}: load_text_encoder: only FLUX.1 can do without text; leave it out"
            )
        return load(entry, device)

    return checked


LOADERS: dict[str, Loader] = {
    "sd15": _with_text(SD15Encoder.load),
    "sdxl": _with_text(SDXLEncoder.load),
    "flux": _load_flux,
    "wan": _with_text(WanEncoder.load),
}
