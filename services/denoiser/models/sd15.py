"""Stable Diffusion 1.5: a UNet that is told of time and text."""

from __future__ import annotations

import torch

from services.common.manifest import ModelEntry
from services.denoiser.models.unet_denoiser import UNetDenoiser, UNetFamily
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh

SD15 = UNetFamily(name="sd15", sample_size=64)


def load_sd15(entry: ModelEntry, device: torch.device, mesh: ParallelMesh = ONE_RANK_MESH) -> UNetDenoiser:
    """The UNet of a manifest entry; raises CheckpointError as `UNetDenoiser.load`."""
    return UNetDenoiser.load(SD15, entry, device, mesh)
