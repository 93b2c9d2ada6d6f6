"""The blocks that Stable Diffusion's UNets are made of (Rombach et al. 2022, section 3.3 and appendix E).

Reference code: CompVis/stable-diffusion `ldm/modules/{diffusionmodules/openaimodel,attention}.py`.

Shapes: B batch, C channels, H and W latent height and width, T time features, L tokens of the text.
A picture `x` is [B, C, H, W] in channels-last memory, so that its tokens [B, H*W, C] are a view.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.modeling.attention import attention
from services.modeling.layers import Conv2d, GatedLinear, Linear, TensorModule
from services.modeling.norms import GroupNorm

ATTENTION_NORM_EPS = 1e-6  # of the GroupNorm ahead of a transformer; every other norm has torch's 1e-5


class ResBlock(TensorModule):
    """Two convolutions around the addition of the time features, and a skip connection."""

    def __init__(self, width_in: int, width: int, time_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, width_in)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        self.time = Linear(time_width, width)
        self.norm2 = GroupNorm(norm_groups, width)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.skip = Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, C_in, H, W], time: [B, T] after its SiLU -> [B, C, H, W]."""
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = h + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h), inplace=True), residual=self.skip(x))


class SelfAttention(TensorModule):
    """Every position of the picture attends to every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(width, 3 * width, bias=False)
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual: [B, H*W, C] -> [B, H*W, C]."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(attention(q, k, v, self.heads), residual=residual)


class CrossAttention(TensorModule):
    """Every position of the picture attends to the text, whose keys and values are computed once a request."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_kv = Linear(context_width, 2 * width, bias=False)
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor, context_kv: Tensor, residual: Tensor) -> Tensor:
        """x and residual: [B, H*W, C], context_kv: [B, L, 2*C] = to_kv(context) -> [B, H*W, C]."""
        k, v = context_kv.chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(x), k, v, self.heads), residual=residual)


class GatedMLP(TensorModule):
    """GEGLU, then a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = GatedLinear(width, 4 * width)
        self.to_out = Linear(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual: [B, H*W, C] -> [B, H*W, C]."""
        return self.to_out(self.proj(x), residual=residual)


class TransformerBlock(TensorModule):
    """Self-attention, cross-attention and a gated MLP, each behind a LayerNorm and a residual."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor, context_kv: Tensor) -> Tensor:
        """x: [B, H*W, C], context_kv: [B, L, 2*C] -> [B, H*W, C]."""
        x = self.self_attention(self.norm1(x), residual=x)
        x = self.cross_attention(self.norm2(x), context_kv, residual=x)
        return self.mlp(self.norm3(x), residual=x)


class SpatialTransformer(TensorModule):
    """Transformer blocks over the positions of the picture, between two linear maps and a residual."""

    def __init__(self, width: int, context_width: int, heads: int, norm_groups: int, layers: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, width, eps=ATTENTION_NORM_EPS)
        self.proj_in = Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, context_width, heads) for _ in range(layers))
        self.proj_out = Linear(width, width)

    def forward(self, x: Tensor, context_kv: Iterator[Tensor]) -> Tensor:
        """x: [B, C, H, W], context_kv: yields [B, L, 2*C] to each block -> [B, C, H, W]."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.blocks:
            tokens = block(tokens, next(context_kv))
        return to_picture(self.proj_out(tokens, residual=to_tokens(x)), x.shape[-2:])


class Downsample(TensorModule):
    """Halves height and width, rounding up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]."""
        return self.conv(x)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_picture(tokens: Tensor, size: torch.Size) -> Tensor:
    """tokens: [B, H*W, C], size: (H, W) -> [B, C, H, W] in channels-last memory: a view."""
    return tokens.view(len(tokens), *size, -1).permute(0, 3, 1, 2)


def time_features(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t / 10000^(i/half) (Vaswani et al. 2017, 3.5), in float32. [B] -> [B, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
