"""Convolutions over the frames of a film that never look ahead, and what they remember between two pieces of it.

A film's feature maps are [T, C, H, W]: its frames as a batch, channels last in memory, so that every layer but the
convolutions over time is the layer of a picture. A film may come in pieces of any number of frames; the result does not
depend on where it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.modeling.layers import TensorModule
from services.modeling.winograd import Tiles, bytes_of_tiles, pack_tiles, tiled_conv3d

# Narrower convolutions in float32 are faster as they are: measured, docs/performance.md.
_MIN_TILED_CHANNELS = 96


class Past(dict[nn.Module, Tensor]):
    """The last frames that each layer of a network has seen of a film; empty before the first frame."""

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Copies a layer's last frames over those that it had: in new memory each time, it would be left in holes."""
        if layer in self:
            self[layer].copy_(frames)
        else:
            self[layer] = frames.clone()  # not a view: that would keep the whole piece


Prepare: TypeAlias = Callable[[Tensor, Tensor], object]


def _copy(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


class CausalConv3d(TensorModule):
    """A convolution over the frame at hand and those before it; before the first frame there is nothing but zeros.

    Height and width are padded to stay as they are. x: [T, C_in, H, W] -> [T, C_out, H, W].
    """

    may_tile = True
    _tiles: Sequence[Tiles] | None = None

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self._frames_before = kernel[0] - 1
        self._padding = (0, kernel[1] // 2, kernel[2] // 2)

    def forward(self, x: Tensor, past: Past, prepare: Prepare = _copy) -> Tensor:
        """prepare: writes what is convolved, given x and where to: what would be a copy is the layer before."""
        # Not torch.cat, which may choose the other memory format, and every convolution would bring it back.
        frames = x.new_empty(self._frames_before + len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        frames[: self._frames_before] = past.get(self, 0)
        prepare(x, frames[self._frames_before :])
        skipped = self._frames_before if self not in past and len(x) == 1 else 0  # zeros, which add nothing
        past.remember(self, frames[len(x) :])
        if self._tiles is None:
            return _conv3d(frames[skipped:], self.weight[:, :, skipped:], self.bias, padding=self._padding)
        return tiled_conv3d(frames[skipped:], self._tiles[skipped:], self.bias)

    def pack(self) -> None:
        """A wide 3x3x3 kernel in float32 becomes three 3x3 ones, one a frame, with fewer products each."""
        if self.may_tile and self.tile_bytes():
            self._tiles = [pack_tiles(frame_kernel) for frame_kernel in self.weight.unbind(dim=2)]
        else:
            weight = self.weight.contiguous(memory_format=torch.channels_last_3d)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def tile_bytes(self) -> int:
        """What the tiles of a wide 3x3x3 kernel in float32 take; 0 for another."""
        out_channels, in_channels, *kernel = self.weight.shape
        is_wide = min(in_channels, out_channels) >= _MIN_TILED_CHANNELS
        is_tiled = kernel == [3, 3, 3] and is_wide and self.weight.dtype == torch.float32
        return bytes_of_tiles(self.weight) if is_tiled else 0


class HalveFrames(TensorModule):
    """Keeps the first frame of a film and makes one frame of each two that follow, by looking at the one before, too.

    x: [1, C, H, W] at the beginning, later [2 n, C, H, W] -> [1, C, H, W], later [n, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        frames = torch.cat([past[self], x]) if self in past else None
        past.remember(self, x[-1:])
        return x if frames is None else _conv3d(frames, self.weight, self.bias, frame_stride=2)


class DoubleFrames(TensorModule):
    """Keeps the first frame of a film and makes two of each that follows.

    The convolution has not seen the first frame when it comes to the second: to it that one is the first.
    x: [1, C, H, W] at the beginning, later [n, C, H, W] -> [1, C, H, W], later [2 n, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self not in past:
            past[self] = x[:0]
            return x
        return torch.stack(self.conv(x, past).chunk(2, dim=1), dim=1).flatten(0, 1)


def _conv3d(
    frames: Tensor, weight: Tensor, bias: Tensor, *, padding: tuple[int, int, int] = (0, 0, 0), frame_stride: int = 1
) -> Tensor:
    """A convolution over frames [T, C_in, H, W] -> [T', C_out, H', W'], both as views of a film [1, C, T, H, W]."""
    film = F.conv3d(frames.permute(1, 0, 2, 3)[None], weight, bias, stride=(frame_stride, 1, 1), padding=padding)
    return film[0].permute(1, 0, 2, 3)
