"""Linear layers of which each rank of an axis has a part, and which exchange what they compute."""

from __future__ import annotations

from torch import Tensor, distributed, nn
from torch.nn import functional as F

from services.modeling.layers import Linear
from services.modeling.packing import packed_linear
from services.modeling.parallel.gathering import all_gather
from services.modeling.parallel.mesh import Axis


class SharedLinear(Linear):
    """A whole layer's place on one rank; its parameters are the rank's. `delta` is added before the exchange."""

    def __init__(self, whole: nn.Linear, axis: Axis) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias, self.axis = whole.weight, whole.bias, axis


class SummedLinear(SharedLinear):
    """x Wᵀ + b (+ residual) where each rank has some of x's channels. x: [..., in / ranks] -> [..., out].

    The bias is added by the first rank, and the residual to the sum.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        """delta: [..., out], a part of what is added to the product."""
        weight, bias = self.weight, self.bias if self.axis.rank == 0 else None
        if weight.is_mkldnn:
            y = packed_linear(x, weight, bias, add=delta)
        else:
            y = F.linear(x, weight, bias)
            y = y if delta is None else y + delta
        distributed.all_reduce(y, group=self.axis.group)
        return y if residual is None else y + residual


class GatheredLinear(SharedLinear):
    """x Wᵀ + b (+ residual) where each rank computes some outputs, and has all. x: [..., in] -> [..., out]."""

    def forward(self, x: Tensor, residual: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        """delta: [..., out / ranks], added to this rank's outputs."""
        part = super().forward(x, residual=delta)
        parts = part.new_empty(self.axis.size * len(part), *part.shape[1:])
        all_gather(parts, part.contiguous(), self.axis)
        y = parts.view(self.axis.size, *part.shape).movedim(0, -2).flatten(-2)
        return y if residual is None else y + residual
