"""What a Wan transformer is told of keyframes: which frames of which latent frame are given."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import InvalidRequestError
from services.denoiser.models.wan_keyframes import image_latents

LATENTS = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("indices", "frames"),
    [
        ([0], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ([0, 8], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]),
        ([0, 4, 8], [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]),
        ([0, 2, 5, 8], [[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]),
    ],
)
def test_the_mask_says_which_frames_of_each_latent_frame_are_given(indices: list[int], frames: list[list[int]]) -> None:
    joined = image_latents(LATENTS, indices)
    assert joined.shape == (1, 20, 3, 4, 6)
    assert torch.equal(joined[:, 4:], LATENTS)
    for row, column in ((0, 0), (3, 5)):
        assert joined[0, :4, :, row, column].T.tolist() == frames


def test_a_frame_beyond_the_end_is_an_error_that_names_the_last() -> None:
    with pytest.raises(InvalidRequestError, match=r"keyframe_indices.*last frame is 8"):
        image_latents(LATENTS, [0, 9])
