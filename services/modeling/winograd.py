"""3 x 3 convolution with 16 products for 4 outputs instead of 36: F(2x2, 3x3) of Lavin & Gray 2015 (arXiv 1509.09308).

Every 4 x 4 tile of the input is transformed by sums and differences, multiplied with the equally transformed weights
(one matrix product over the channels for each of the 16 places in a tile) and transformed back to 2 x 2 outputs. In
float32 the result is as exact as the direct sum; in bfloat16 the transformed values would be rounded, so it isn't used.

It is done in strips of rows, so that what is on the way stays in the CPU's cache and takes little memory.

B batch, T frames, H and W height and width, h and w half of them rounded up, C and K channels in and out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling.packing import pack_linear_weight, packed_linear

# G of the paper: from the three weights along one side to the four of a tile.
_WEIGHT_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

_STRIP_ELEMENTS = 2**20  # of the input: half and twice as many are no faster

Tiles = Sequence[Sequence[Tensor]]  # 4 x 4: row, column


def pack_tiles(weight: Tensor) -> Tiles:
    """The weight [K, C, 3, 3] as 4 x 4 packed matrices [K, C]."""
    transform = weight.new_tensor(_WEIGHT_TRANSFORM)
    # A row at a time: all at once, what is on the way would be as large as the tiles.
    rows = (torch.einsum("a,kcab,jb->jkc", of_row, weight, transform) for of_row in transform)
    return [[pack_linear_weight(tile) for tile in row] for row in rows]


def bytes_of_tiles(weight: Tensor) -> int:
    """What the tiles of a kernel [K, C, 3, 3] take: 16 places for 9."""
    return weight.nbytes // 9 * 16


def tiled_conv2d(x: Tensor, tiles: Tiles, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolution with stride and padding 1 (+ residual). x: [B, C, H, W] -> [B, K, H, W] in channels-last memory."""
    y = tiled_conv3d(x, [tiles], bias)
    return y if residual is None else y.add_(residual)


def tiled_conv3d(frames: Tensor, kernels: Sequence[Tiles], bias: Tensor | None) -> Tensor:
    """Convolution with stride 1, and padding 1 along the sides alone: [T + D - 1, C, H, W] -> [T, K, H, W].

    kernels: the tiles of each of the D frames of the kernel. A frame is transformed once, and what its places yield
    with all of them is summed up before it is transformed back. The result is in channels-last memory.
    """
    x_THWC = frames.permute(0, 2, 3, 1)
    _, height, width, channels = x_THWC.shape
    length = len(frames) - len(kernels) + 1
    y_THWK = frames.new_empty(length, height, width, kernels[0][0][0].shape[0])
    rows = max(_STRIP_ELEMENTS // (len(frames) * width * channels) // 2, 1) * 2
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        _convolve_strip(_padded_strip(x_THWC, top, bottom), kernels, bias, y_THWK[:, top:bottom])
    return y_THWK.permute(0, 3, 1, 2)


def _padded_strip(x_THWC: Tensor, top: int, bottom: int) -> Tensor:
    """The rows from `top` to `bottom` and one more on each side, zeros beyond the picture; an even number of each."""
    height, width = x_THWC.shape[1:3]
    strip = x_THWC[:, max(top - 1, 0) : bottom + 1]
    below = (bottom == height) + (bottom - top) % 2
    return F.pad(strip, (0, 0, 1, 1 + width % 2, int(top == 0), below))


def _convolve_strip(x_THWC: Tensor, kernels: Sequence[Tiles], bias: Tensor | None, y_ThwK: Tensor) -> None:
    """Writes the convolution of a padded strip to the rows that it is for."""
    height, width = x_THWC.shape[1] - 2, x_THWC.shape[2] - 2
    halves = []
    for i, row in enumerate(_input_transform(*(x_THWC[:, i : i + height : 2] for i in range(4)))):
        places = _input_transform(*(row[:, :, j : j + width : 2] for j in range(4)))
        # Place (1, 1) enters every output once and so brings the bias.
        products = (
            _sum_of_products(x, [tiles[i][j] for tiles in kernels], bias if i == j == 1 else None)
            for j, x in enumerate(places)
        )
        halves.append(_output_transform(*products))
    for q in range(2):
        for p, values in enumerate(_output_transform(*(half[q] for half in halves))):
            where = y_ThwK[:, p::2, q::2]
            where.copy_(values[:, : where.shape[1], : where.shape[2]])


def _sum_of_products(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Of D frames in a row, each with its weight: [T + D - 1, h, w, C] -> [T, h, w, K]."""
    length = len(x) - len(weights) + 1
    y = packed_linear(x[:length], weights[0], bias)
    for number, weight in enumerate(weights[1:], start=1):
        y = packed_linear(x[number : number + length], weight, add=y)
    return y


def _input_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bᵀ of the paper."""
    return a - c, b + c, c - b, b - d


def _output_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Aᵀ of the paper."""
    return (a + b).add_(c), (b - c).sub_(d)
