"""SDXL's VAE."""

from __future__ import annotations

import torch

from services.common.manifest import ModelEntry
from services.decoder.models.autoencoder_kl import LatentScale
from services.decoder.models.vae_decoder import VaeDecoder, VaeFamily

# In float16 its decoder overflows on nearly all latents.
SDXL = VaeFamily(name="sdxl", latent_scale=LatentScale(factor=0.13025), half=torch.float32)


def load_sdxl(entry: ModelEntry, device: torch.device) -> VaeDecoder:
    """The VAE of a manifest entry; raises CheckpointError as `VaeDecoder.load`."""
    return VaeDecoder.load(SDXL, entry, device)
