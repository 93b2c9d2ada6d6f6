"""Convolutions over the frames of a film that never look ahead, and what they remember between two pieces of it.

A film's feature maps are [T, C, H, W]: its frames as a batch, channels last in memory, so that every layer but the
convolutions over time is the layer of a picture. A film may come in pieces of any number of frames; the result does not
depend on where it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from services.modeling.winograd import Tiles, pack_tiles, tiled_conv2d

# Narrower convolutions in float32 are faster as they are: measured, docs/performance.md.
_MIN_TILED_CHANNELS = 192


class Past(dict[nn.Module, Tensor]):
    """The last frames that each layer of a network has seen of a film; empty before the first frame."""


class CausalConv3d(nn.Conv3d):
    """A convolution over the frame at hand and those before it; before the first frame there is nothing but zeros.

    Height and width are padded to stay as they are. x: [T, C_in, H, W] -> [T, C_out, H, W].
    """

    __call__: Callable[..., Tensor]
    _tiles: Sequence[Tiles] | None = None

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        frames, height, width = kernel
        super().__init__(in_channels, out_channels, kernel, padding=(0, height // 2, width // 2))
        self._frames_before = frames - 1

    def forward(self, x: Tensor, past: Past) -> Tensor:
        before = past.get(self)
        if before is None:
            before = x.new_zeros(self._frames_before, *x.shape[1:])
        frames = torch.cat([before, x])
        past[self] = frames[len(x) :].clone()  # not a view: that would keep the whole piece
        return self.convolve(frames)

    def convolve(self, frames: Tensor) -> Tensor:
        """The convolution of those frames alone: [T + frames before, C_in, H, W] -> [T, C_out, H, W]."""
        if self._tiles is None:
            return as_frames(super().forward(as_film(frames)))
        length = len(frames) - self._frames_before
        bias, out = self.bias, None
        for number, tiles in enumerate(self._tiles):
            out, bias = tiled_conv2d(frames[number : number + length], tiles, bias, out), None
        assert out is not None, "a kernel has at least one frame"
        return out

    def pack(self) -> None:
        """A wide 3x3x3 kernel in float32 becomes three 3x3 ones, one a frame, with fewer products each."""
        if self.kernel_size == (3, 3, 3) and self._is_wide() and self.weight.dtype == torch.float32:
            self._tiles = [pack_tiles(kernel) for kernel in self.weight.unbind(dim=2)]
        else:
            weight = self.weight.contiguous(memory_format=torch.channels_last_3d)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def _is_wide(self) -> bool:
        return min(self.in_channels, self.out_channels) >= _MIN_TILED_CHANNELS


class HalveFrames(nn.Conv3d):
    """Keeps the first frame of a film and makes one frame of each two that follow, by looking at the one before, too.

    x: [1, C, H, W] at the beginning, later [2 n, C, H, W] -> [1, C, H, W], later [n, C, H, W].
    """

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        before = past.get(self)
        past[self] = x[-1:].clone()
        return x if before is None else as_frames(super().forward(as_film(torch.cat([before, x]))))


class DoubleFrames(CausalConv3d):
    """Keeps the first frame of a film and makes two of each that follows.

    The convolution has not seen the first frame when it comes to the second: to it that one is the first.
    x: [1, C, H, W] at the beginning, later [n, C, H, W] -> [1, C, H, W], later [2 n, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self not in past:
            past[self] = x.new_zeros(self._frames_before, *x.shape[1:])
            return x
        pairs = super().forward(x, past)
        return pairs.unflatten(1, (2, -1)).flatten(0, 1)


def as_film(frames: Tensor) -> Tensor:
    """[T, C, H, W] -> [1, C, T, H, W]: a view."""
    return frames.permute(1, 0, 2, 3)[None]


def as_frames(film: Tensor) -> Tensor:
    """[1, C, T, H, W] -> [T, C, H, W]: a view."""
    return film[0].permute(1, 0, 2, 3)
