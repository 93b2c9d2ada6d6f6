"""FLUX.1's VAE: 16 latent channels, shifted before they are scaled, and no convolutions around the latents."""

from __future__ import annotations

import torch

from services.common.manifest import ModelEntry
from services.decoder.models.autoencoder_kl import LatentScale
from services.decoder.models.vae_decoder import VaeDecoder, VaeFamily

FLUX = VaeFamily(name="flux", latent_scale=LatentScale(factor=0.3611, shift=0.1159), half=torch.bfloat16)


def load_flux(entry: ModelEntry, device: torch.device) -> VaeDecoder:
    """The VAE of a manifest entry; raises CheckpointError as `VaeDecoder.load`."""
    return VaeDecoder.load(FLUX, entry, device)
