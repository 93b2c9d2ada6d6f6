"""3 x 3 convolution with 16 products for 4 outputs instead of 36: F(2x2, 3x3) of Lavin & Gray 2015 (arXiv 1509.09308).

Every 4 x 4 tile of the input is transformed by sums and differences, multiplied with the equally transformed weights
(one matrix product over the channels for each of the 16 places in a tile) and transformed back to 2 x 2 outputs. In
float32 the result is as exact as the direct sum; in bfloat16 the transformed values would be rounded, so it isn't used.

B batch, H and W height and width, h and w half of them rounded up, C and K channels in and out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling.packing import pack_linear_weight, packed_linear

# G of the paper: from the three weights along one side to the four of a tile.
_WEIGHT_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

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
    batch, _, height, width = x.shape
    products = _multiply(_input_tiles(x), tiles, bias)
    y_BhpwqK = x.new_empty(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, products[0][0].shape[-1])
    columns = [_output_transform(*row) for row in products]
    for q in range(2):
        for p, values in enumerate(_output_transform(*(row[q] for row in columns))):
            y_BhpwqK[:, :, p, :, q] = values
    y = y_BhpwqK.flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)
    y = y.contiguous(memory_format=torch.channels_last)
    return y if residual is None else y.add_(residual)


def _input_tiles(x: Tensor) -> Tiles:
    """[B, C, H, W] -> 4 x 4 tensors [B, h, w, C], one for each place in a tile."""
    height, width = x.shape[-2] + x.shape[-2] % 2, x.shape[-1] + x.shape[-1] % 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, width - x.shape[-1] + 1, 1, height - x.shape[-2] + 1))
    rows = _input_transform(*(padded[:, i : i + height : 2] for i in range(4)))
    return [_input_transform(*(row[:, :, j : j + width : 2] for j in range(4))) for row in rows]


def _multiply(inputs: Tiles, weights: Tiles, bias: Tensor | None) -> Tiles:
    """One product over the channels for each place; place (1, 1) enters every output once and so brings the bias."""
    return [
        [packed_linear(inputs[i][j], weights[i][j], bias if i == j == 1 else None) for j in range(4)] for i in range(4)
    ]


def _input_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bᵀ of the paper."""
    return a - c, b + c, c - b, b - d


def _output_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Aᵀ of the paper."""
    return (a + b).add_(c), (b - c).sub_(d)
