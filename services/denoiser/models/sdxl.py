"""SDXL: a UNet that is also told of the whole text and of a picture's sizes (Podell et al. 2023, section 2.2).

Paper: https://arxiv.org/abs/2307.01952
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.v1.work_pb2 import SizeConditioning
from services.common.manifest import ModelEntry
from services.denoiser.conditioning import PromptConditioning, checked_tensor
from services.denoiser.models.scheduler_config import AYS_SDXL
from services.denoiser.models.sd_unet_params import SDUNetParams
from services.denoiser.models.unet_blocks import time_features
from services.denoiser.models.unet_denoiser import UNetDenoiser, UNetFamily
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh

_PIXELS_PER_LATENT = 8


class PooledTextAndSizes:
    """The pooled text of CLIP-G, then sinusoids of the original's height and width, of what was cropped from top and
    left, and of the target's height and width, in pixels."""

    tensor = "pooled_prompt_embeds"

    def features(self, conditioning: PromptConditioning, params: SDUNetParams) -> Tensor:
        """[1, pooled_width + 6 * size_width], float32.

        Raises:
            InvalidRequestError: the pooled text is missing or of the wrong shape.
        """
        pooled = checked_tensor(conditioning, self.tensor, 2, params.pooled_width)
        numbers = torch.tensor(told_sizes(conditioning), dtype=torch.float32)
        return torch.cat([pooled.float(), time_features(numbers, params.size_width).reshape(1, -1)], dim=-1)


def told_sizes(conditioning: PromptConditioning) -> tuple[int, int, int, int, int, int]:
    """The six numbers in their order; those that the request leaves out are those of the picture, uncropped."""
    sizes = conditioning.sizes or SizeConditioning()
    height, width = (_PIXELS_PER_LATENT * extent for extent in conditioning.latent_shape[-2:])
    return (
        sizes.original_height or height,
        sizes.original_width or width,
        sizes.crop_top,
        sizes.crop_left,
        sizes.target_height or height,
        sizes.target_width or width,
    )


SDXL = UNetFamily(name="sdxl", sample_size=128, added=PooledTextAndSizes(), ays_timesteps=AYS_SDXL)


def load_sdxl(entry: ModelEntry, device: torch.device, mesh: ParallelMesh = ONE_RANK_MESH) -> UNetDenoiser:
    """The UNet of a manifest entry; raises CheckpointError as `UNetDenoiser.load`."""
    return UNetDenoiser.load(SDXL, entry, device, mesh)
