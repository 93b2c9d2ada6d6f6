"""Which decoder serves which model family. A new family is a file in models/ and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from safelight.v1.model_pb2 import ModelDescription
from services.common.manifest import ModelEntry
from services.decoder.models.flux import load_flux
from services.decoder.models.sd15 import load_sd15
from services.decoder.models.sdxl import load_sdxl
from services.decoder.models.wan import WanDecoder
from services.decoder.tiling import Tiling
from services.modeling.placement import PlacedWeights


@runtime_checkable
class PictureDecoder(Protocol):
    """What the engine needs of a model family."""

    fingerprint: str
    weights: Sequence[PlacedWeights]

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        ...

    def decode(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """Latents [1, C, h, w] to a picture [1, 3, H, W] about in [-1, 1]."""
        ...

    def encode(self, image: Tensor, tiling: Tiling) -> Tensor:
        """A picture [1, 3, H, W] in [-1, 1] to latents [1, C, h, w]."""
        ...


@runtime_checkable
class FilmDecoder(Protocol):
    """What the engine needs of a family that makes films."""

    fingerprint: str
    weights: Sequence[PlacedWeights]

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model; `frames_per_latent` says that it makes films."""
        ...

    def decode_film(self, latents: Tensor, tiling: Tiling) -> Iterator[Tensor]:
        """Latents [1, C, T, h, w] to the frames [n, 3, H, W], about in [-1, 1], of each latent frame, in order."""
        ...

    def encode_film(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        """A film's frames [n, 3, H, W] in [-1, 1], those of a latent frame together, to each one's [1, C, 1, h, w]."""
        ...


Decoder: TypeAlias = PictureDecoder | FilmDecoder

LOADERS: dict[str, Callable[[ModelEntry, torch.device], Decoder]] = {
    "sd15": load_sd15,
    "sdxl": load_sdxl,
    "flux": load_flux,
    "wan": WanDecoder.load,
}
