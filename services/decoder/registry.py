"""Which decoder serves which model family. A new family is a file in models/ and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from safelight.v1.model_pb2 import ModelDescription
from services.common.manifest import ModelEntry
from services.decoder.models.flux import load_flux
from services.decoder.models.sd15 import load_sd15
from services.decoder.tiling import Tiling


class PictureDecoder(Protocol):
    """What the engine needs of a model family."""

    fingerprint: str

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        ...

    def decode(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """Latents [1, C, h, w] to a picture [1, 3, H, W] about in [-1, 1]."""
        ...

    def encode(self, image: Tensor, tiling: Tiling) -> Tensor:
        """A picture [1, 3, H, W] in [-1, 1] to latents [1, C, h, w]."""
        ...


LOADERS: dict[str, Callable[[ModelEntry, torch.device], PictureDecoder]] = {
    "sd15": load_sd15,
    "flux": load_flux,
}
