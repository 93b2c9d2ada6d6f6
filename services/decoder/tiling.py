"""Decoding and encoding of pictures too large for one pass, by overlapping tiles blended along linear ramps.

Memory is that of one tile and of the result. What differs from one pass: near a tile's border the convolutions see
zeros in place of the neighbour, which the blending fades out, and layers that see the whole picture (the attention and
the group norms of an AutoencoderKL) see the whole tile instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """When and how to tile, in latent pixels: sides, overlap of neighbours, and the largest area done in one pass."""

    tile: int = 64
    overlap: int = 16
    untiled_area: int = 128 * 128

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(f"overlap must be from 0 to half of the tile ({self.tile}), got {self.overlap}")


DEFAULT_TILING = Tiling()


def tiled_decode(
    decode: Callable[[Tensor], Tensor], latents: Tensor, downsampling: int, tiling: Tiling = DEFAULT_TILING
) -> Tensor:
    """`decode(latents)`, in tiles if it is large: [B, Z, h, w] -> [B, C, h * downsampling, w * downsampling]."""
    height, width = latents.shape[-2:]
    if height * width <= tiling.untiled_area:
        return decode(latents)
    return _blend(decode, latents, Tiles(height, tiling), Tiles(width, tiling), read=1, write=downsampling)


def tiled_encode(
    encode: Callable[[Tensor], Tensor], image: Tensor, downsampling: int, tiling: Tiling = DEFAULT_TILING
) -> Tensor:
    """`encode(image)`, in tiles if it is large: [B, C, H, W] -> [B, Z, H / downsampling, W / downsampling].

    Raises ValueError for a picture in tiles that has a side which is no multiple of `downsampling`.
    """
    height, width = (side // downsampling for side in image.shape[-2:])
    if height * width <= tiling.untiled_area:
        return encode(image)
    if tuple(image.shape[-2:]) != (height * downsampling, width * downsampling):
        raise ValueError(f"sides must be multiples of {downsampling}, got {tuple(image.shape[-2:])}")
    return _blend(encode, image, Tiles(height, tiling), Tiles(width, tiling), read=downsampling, write=1)


class Tiles:
    """Tiles along one side of `length` latent pixels: as few as cover it, all of one size, evenly spread."""

    def __init__(self, length: int, tiling: Tiling) -> None:
        count = max(math.ceil((length - tiling.overlap) / (tiling.tile - tiling.overlap)), 1)
        self.length = length
        self.size = math.ceil((length + (count - 1) * tiling.overlap) / count)
        self.starts = [round(number * (length - self.size) / max(count - 1, 1)) for number in range(count)]

    def slices(self, scale: int) -> list[slice]:
        """Where each tile lies, in units of which a latent pixel has `scale`."""
        return [slice(start * scale, (start + self.size) * scale) for start in self.starts]

    def weights(self, scale: int) -> list[Tensor]:
        """How much each tile counts at each of its positions, `size * scale` of them; over all tiles the sum is 1.

        A weight rises along the overlap with the tile before and falls along that with the next.
        """
        position = torch.arange(self.size * scale) + 0.5
        weights = torch.ones(len(self.starts), len(position))
        for number, (start, following) in enumerate(pairwise(self.starts)):
            ramp = position / max((start + self.size - following) * scale, 1)
            weights[number] = weights[number].minimum(ramp.flip(0))
            weights[number + 1] = weights[number + 1].minimum(ramp)
        total = torch.zeros(self.length * scale)
        for where, weight in zip(self.slices(scale), weights, strict=True):
            total[where] += weight
        return [weight / total[where] for where, weight in zip(self.slices(scale), weights, strict=True)]


def _blend(
    function: Callable[[Tensor], Tensor], x: Tensor, rows: Tiles, columns: Tiles, *, read: int, write: int
) -> Tensor:
    """The sum, in float32, of the weighted results of `function` for each tile of `x`.

    A latent pixel is `read` pixels of `x` and `write` of the result along each side.
    """
    row_spans = zip(rows.slices(read), rows.slices(write), rows.weights(write), strict=True)
    column_spans = zip(columns.slices(read), columns.slices(write), columns.weights(write), strict=True)
    blended = None
    for (row_in, row_out, row_weight), (column_in, column_out, column_weight) in product(row_spans, column_spans):
        tile = function(x[..., row_in, column_in])
        if blended is None:
            size = (rows.length * write, columns.length * write)
            blended = tile.new_zeros((*tile.shape[:-2], *size), dtype=torch.float32)
        blended[..., row_out, column_out] += tile * torch.outer(row_weight, column_weight).to(tile.device)
    assert blended is not None, "a side has at least one tile"
    return blended.to(tile.dtype)
