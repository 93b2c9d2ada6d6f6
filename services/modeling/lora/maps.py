"""How a layer applies a weight to its input; a change of its weight is applied in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F

from services.modeling.layers import Upsample


class Map(Protocol):
    """A layer's way with weights, and which dimension of its input and output holds the channels."""

    channels: ClassVar[int]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would make of x with this weight, without a bias."""
        ...

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear map of the channels at every place of the output. weight: [O, R]."""
        ...


@dataclass(frozen=True)
class LinearMap:
    """x: [..., I], weight: [O, I] -> [..., O]."""

    channels: ClassVar[int] = -1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    pointwise = __call__


@dataclass(frozen=True)
class ConvMap:
    """x: [B, I, H, W], weight: [O, I, *K] -> [B, O, H', W']."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    channels: ClassVar[int] = 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None])


def map_of(layer: nn.Module) -> Map:
    """That of a layer that can be adapted; of an Upsample, that of its convolution of the larger picture."""
    if isinstance(layer, Upsample):
        layer = layer.conv
    if isinstance(layer, nn.Conv2d):
        padding = cast(tuple[int, int], layer.padding)  # no layer of ours says "same"
        stride, dilation = cast(tuple[int, int], layer.stride), cast(tuple[int, int], layer.dilation)
        return ConvMap(stride, padding, dilation)
    return LinearMap()
