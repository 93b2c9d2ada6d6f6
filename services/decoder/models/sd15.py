"""Stable Diffusion 1.5's VAE."""

from __future__ import annotations

import torch

from services.common.manifest import ModelEntry
from services.decoder.models.autoencoder_kl import LatentScale
from services.decoder.models.vae_decoder import VaeDecoder, VaeFamily

# In float16 its decoder overflows on some latents.
SD15 = VaeFamily(name="sd15", latent_scale=LatentScale(factor=0.18215), half=torch.float32)


def load_sd15(entry: ModelEntry, device: torch.device) -> VaeDecoder:
    """The VAE of a manifest entry; raises CheckpointError as `VaeDecoder.load`."""
    return VaeDecoder.load(SD15, entry, device)
