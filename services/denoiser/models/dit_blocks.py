"""What the transformers of diffusion models share: modulated norms, rotary positions, small embedders.

Shapes: B batch, T tokens, W width, H heads, D channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling.layers import Linear, TensorModule

NORM_EPS = 1e-6
_ROPE_BASE = 10_000.0


class Embedder(TensorModule):
    """Linear, SiLU, linear: [B, in] -> [B, W]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.in_layer = Linear(width_in, width)
        self.out_layer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then times 1 + scale, plus shift. x: [B, T, W], shift and scale: [B, 1 or T, W]."""
    if scale.shape[:2] == (1, 1):  # the norm's own weight and bias: one pass over the memory, one rounding
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def rotations(positions: Tensor, channels: Sequence[int]) -> Tensor:
    """Rotations [T, D/2], complex64, of tokens at positions [T, axes] (Su et al. 2021, RoFormer).

    So many channels of a head turn with each axis; together they are D. Angles are computed in float64.
    """
    angles = [
        position[:, None] * _ROPE_BASE ** -(torch.arange(0, count, 2, dtype=torch.float64) / count)
        for position, count in zip(positions.unbind(1), channels, strict=True)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(qk: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring channels together. qk: [B, T, 2, H, D] float32, rope: [T, D/2] -> like qk."""
    pairs = torch.view_as_complex(qk.reshape(*qk.shape[:-1], qk.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * rope[:, None, None]).flatten(-2)
