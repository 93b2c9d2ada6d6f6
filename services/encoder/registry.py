"""Which encoder serves which model family. A new family is a file in models/ and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safelight.v1.model_pb2 import ModelDescription
from services.common.manifest import ModelEntry
from services.encoder.models.flux import FluxEncoder
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


LOADERS: dict[str, Callable[[ModelEntry, torch.device], PromptEncoder]] = {
    "sd15": SD15Encoder.load,
    "sdxl": SDXLEncoder.load,
    "flux": FluxEncoder.load,
    "wan": WanEncoder.load,
}
