"""What a Wan transformer is told of the pictures that lead a film: their latents, and in which frames they are.

Reference code: Wan-Video/Wan2.1, wan/image2video.py and wan/first_last_frame2video.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safelight.errors import InvalidRequestError

FRAMES_PER_LATENT = 4  # after the first frame, which has a latent frame of its own
MASK_CHANNELS = FRAMES_PER_LATENT  # one for each frame of a latent frame


def image_latents(latents: Tensor, indices: Sequence[int]) -> Tensor:
    """The mask and the latents of a film that shows the keyframes and grey between.

    Args:
        latents: [1, C, T, h, w].
        indices: numbers of the frames that are given, from 0.

    Returns:
        [1, 4 + C, T, h, w], the mask first: 1 where a frame is given.

    Raises:
        InvalidRequestError: the film has no such frame.
    """
    count, *size = latents.shape[2:]
    last = (count - 1) * FRAMES_PER_LATENT
    if max(indices) > last:
        raise InvalidRequestError.of("keyframe_indices", f"are {list(indices)}; the film's last frame is {last}")
    frames = torch.zeros(1 + last)
    frames[list(indices)] = 1
    # The first frame counts four times, so that it fills its latent frame.
    spread = torch.cat([frames[:1].expand(FRAMES_PER_LATENT - 1), frames]).view(count, FRAMES_PER_LATENT)
    mask = spread.T[None, :, :, None, None].expand(1, MASK_CHANNELS, count, *size)
    return torch.cat([mask.to(latents), latents], dim=1)
