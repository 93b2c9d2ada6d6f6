"""An AutoencoderKL as the engine sees it: latents in, picture out, and the other way round; a family's own file says
what no shape tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.v1.model_pb2 import DecoderDescription, ModelDescription
from services.common.manifest import ModelEntry
from services.decoder.models.autoencoder_kl import AutoencoderKL, LatentScale, load_autoencoder_kl
from services.decoder.tiling import Tiling, tiled_decode, tiled_encode
from services.modeling.components import open_component
from services.modeling.placement import Placed, PlacedWeights, place, placement_of
from services.modeling.wire import DATA_TYPES


@dataclass(frozen=True, kw_only=True)
class VaeFamily:
    """What tells one family's VAE from another's, beside its dimensions.

    Args:
        name: "sd15", "flux" …
        latent_scale: where no config says.
        half: the dtype that "auto" is on a GPU.
    """

    name: str
    latent_scale: LatentScale
    half: torch.dtype


class VaeDecoder:
    """An AutoencoderKL that tiles large pictures.

    Args:
        family: of the model.
        vae: the network, placed.
        fingerprint: of its weights.
    """

    def __init__(self, family: VaeFamily, vae: Placed[AutoencoderKL], fingerprint: str) -> None:
        self._family = family
        self._vae = vae.network
        self.weights: Sequence[PlacedWeights] = (vae.weights,)
        self.fingerprint = fingerprint
        self._device, self._dtype = vae.placement.device, vae.placement.dtype

    @classmethod
    def load(cls, family: VaeFamily, entry: ModelEntry, device: torch.device) -> VaeDecoder:
        """Read the VAE of a manifest entry, from any layout, onto the device.

        Raises:
            CheckpointError: the weights are missing, damaged or not of this architecture.
        """
        source = open_component(entry, entry.decoder, "vae")
        placement = placement_of(entry.decoder, device, family.half)
        vae = load_autoencoder_kl(
            source.checkpoint,
            source.config,
            device=placement.loading_device,
            dtype=placement.dtype,
            latent_scale=family.latent_scale,
        )
        return cls(family, place(vae, placement, vae.weight_blocks()), source.checkpoint.fingerprint)

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        decoder = DecoderDescription(
            fingerprint=self.fingerprint,
            scale_factor=self._vae.params.downsampling,
            latent_channels=self._vae.params.latent_channels,
            dtype=DATA_TYPES[self._dtype],
        )
        return ModelDescription(name=name, family=self._family.name, decoder=decoder)

    def decode(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """The picture [1, 3, H, W], about in [-1, 1], of a denoiser's latents [1, C, h, w]."""
        mean = self._vae.denormalize(latents.to(self._device, torch.float32))
        return tiled_decode(self._vae.decode, mean, self._vae.params.downsampling, tiling)

    def encode(self, image: Tensor, tiling: Tiling) -> Tensor:
        """The latents [1, C, h, w], float32, of a picture [1, 3, H, W] in [-1, 1]."""
        mean = tiled_encode(self._vae.encode, image.to(self._device), self._vae.params.downsampling, tiling)
        return self._vae.normalize(mean.float())
