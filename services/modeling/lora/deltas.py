"""Changes to a layer's weight and bias, in the forms that they are computed in; every one is exact.

A change of a weight can be applied to the layer's input without ever being a matrix (a branch beside the layer), and
can be written out as one (to be added to the layer's weight).

Shapes: O and I the layer's widths (or channels) out and in, K the kernel's sides (none for a linear layer), R the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from services.modeling.lora.maps import Map
from services.modeling.parallel.shards import Span


class WeightDelta(Protocol):
    """A change [O, I, *K] to a weight."""

    def branch(self, x: Tensor, apply: Map) -> Tensor:
        """What the change adds to the layer's output."""
        ...

    def weight(self) -> Tensor:
        """The change, written out in float32."""
        ...

    def rows(self, start: int, stop: int) -> WeightDelta:
        """The change of some rows of the weight."""
        ...

    def columns(self, spans: Sequence[Span]) -> WeightDelta:
        """The change of some columns of the weight, stretch by stretch."""
        ...

    def to(self, dtype: torch.dtype) -> WeightDelta:
        """The same in another dtype."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """up @ down: first the layer's own kind of map to R channels, then a linear map of each place's channels.

    Args:
        down: [R, I, *K].
        up: [O, R].
    """

    down: Tensor
    up: Tensor

    def branch(self, x: Tensor, apply: Map) -> Tensor:
        return apply.pointwise(apply(x, self.down), self.up)

    def weight(self) -> Tensor:
        return (self.up.float() @ self.down.flatten(1).float()).view(len(self.up), *self.down.shape[1:])

    def rows(self, start: int, stop: int) -> LowRank:
        return LowRank(self.down, self.up[start:stop])

    def columns(self, spans: Sequence[Span]) -> LowRank:
        return LowRank(_columns(self.down, spans), self.up)

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.down.to(dtype), self.up.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, eq=False)
class Kronecker:
    """left ⊗ right (LoKr): the input's channels are left's times right's.

    Args:
        left: [P, S].
        right: [O / P, I / S, *K].
    """

    left: Tensor
    right: Tensor

    def branch(self, x: Tensor, apply: Map) -> Tensor:
        if apply.channels == 1:
            return self._of_picture(x, apply)
        inner = apply(x.reshape(*x.shape[:-1], self.left.shape[1], -1), self.right)  # [..., S, O/P]
        return (self.left @ inner).flatten(-2)

    def _of_picture(self, x: Tensor, apply: Map) -> Tensor:
        batch, parts = len(x), self.left.shape[1]
        inner = apply(x.reshape(batch * parts, -1, *x.shape[2:]), self.right)  # [B * S, O/P, H', W']
        outer = torch.einsum("ps,bsohw->bpohw", self.left, inner.view(batch, parts, *inner.shape[1:]))
        return outer.flatten(1, 2)

    def weight(self) -> Tensor:
        left = self.left.float().reshape(*self.left.shape, *[1] * (self.right.ndim - 2))
        return torch.kron(left, self.right.float().contiguous())

    def rows(self, start: int, stop: int) -> Kronecker | Dense:
        height = len(self.right)
        if start % height == stop % height == 0:
            return Kronecker(self.left[start // height : stop // height], self.right)
        return Dense(self.weight()[start:stop].to(self.right.dtype))

    def columns(self, spans: Sequence[Span]) -> Kronecker | Dense:
        width = self.right.shape[1]
        if all(edge % width == 0 for span in spans for edge in span):
            return Kronecker(
                _columns(self.left, [(start // width, stop // width) for start, stop in spans]), self.right
            )
        return Dense(_columns(self.weight(), spans).to(self.right.dtype))

    def to(self, dtype: torch.dtype) -> Kronecker:
        return Kronecker(self.left.to(dtype), self.right.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


@dataclass(frozen=True, eq=False)
class Dense:
    """A change without a shorter form.

    Args:
        change: [O, I, *K].
    """

    change: Tensor

    def branch(self, x: Tensor, apply: Map) -> Tensor:
        return apply(x, self.change)

    def weight(self) -> Tensor:
        return self.change.float()

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.change[start:stop].clone())

    def columns(self, spans: Sequence[Span]) -> Dense:
        return Dense(_columns(self.change, spans))

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.change.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.change.nbytes


def _columns(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([tensor[:, start:stop] for start, stop in spans], dim=1)


@dataclass(frozen=True, eq=False)
class Offset:
    """A change of a layer's bias: the same at every place of the output, whatever the input.

    Args:
        change: [O].
    """

    change: Tensor

    def branch(self, x: Tensor, apply: Map) -> Tensor:
        """What it adds to every place: [O], or [O, 1, 1] for pictures."""
        return self.change.view(-1, *[1] * (x.ndim - 2)) if apply.channels == 1 else self.change

    def rows(self, start: int, stop: int) -> Offset:
        return Offset(self.change[start:stop])

    def columns(self, spans: Sequence[Span]) -> Offset:
        """The ranks' outputs are summed, so the one that has the first column brings it."""
        return self if spans[0][0] == 0 else Offset(torch.zeros_like(self.change))

    def to(self, dtype: torch.dtype) -> Offset:
        return Offset(self.change.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.change.nbytes


Delta: TypeAlias = WeightDelta | Offset
"""What is added to a layer."""
