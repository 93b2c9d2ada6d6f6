"""What one rank has of a network's parameters, and where it lies in the whole ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from services.modeling.parallel.mesh import Axis

Shape = tuple[int, ...]
Span = tuple[int, int]
"""The first index and the one after the last."""


@dataclass(frozen=True)
class Shard:
    """Stretches of a tensor's rows or columns, one after the other.

    Args:
        dim: 0: of the rows; 1: of the columns.
        length: of the whole tensor in that dimension.
        spans: of each stretch.
    """

    dim: int
    length: int
    spans: tuple[Span, ...]

    def whole(self, shape: Sequence[int]) -> Shape:
        """The shape of the whole tensor, by that of the shard."""
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])

    def shape(self, whole: Sequence[int]) -> Shape:
        """The shape of the shard, by that of the whole tensor."""
        width = sum(stop - start for start, stop in self.spans)
        return (*whole[: self.dim], width, *whole[self.dim + 1 :])

    def of(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """The shard of a tensor that lies in several, joined on dimension 0; to be joined so again.

        They are views, but of several spans of columns copies.
        """
        if self.dim == 1:
            return [self._columns(part) for part in joined]
        stops = list(accumulate(map(len, joined)))
        return [
            part[slice(*common)]
            for span in self.spans
            for part, stop in zip(joined, stops, strict=True)
            if (common := _common(_moved(span, len(part) - stop), (0, len(part))))
        ]

    def _columns(self, tensor: Tensor) -> Tensor:
        views = [tensor[:, slice(*span)] for span in self.spans]
        return views[0] if len(views) == 1 else torch.cat(views, dim=1)

    def within(self, span: Span) -> Iterator[tuple[Span, int]]:
        """What the shard has of a span of the whole, and where in the shard each of these begins."""
        start = 0
        for each in self.spans:
            if common := _common(each, span):
                yield common, start + common[0] - each[0]
            start += each[1] - each[0]


def even_shard(dim: int, parts: Sequence[int], axis: Axis) -> Shard:
    """Of each of several parts that lie side by side an even share, all in order.

    Args:
        dim: that they lie side by side in.
        parts: the length of each, which the axis divides.
        axis: of the ranks.
    """
    starts = accumulate(parts, initial=0)
    shares = [(start, length // axis.size) for start, length in zip(starts, parts, strict=False)]
    spans = tuple((start + axis.rank * share, start + (axis.rank + 1) * share) for start, share in shares)
    return Shard(dim, sum(parts), spans)


def leave_shard(network: nn.Module, name: str, shard: Shard) -> None:
    """Puts an empty parameter of a shard's shape in a whole one's place."""
    path, _, kind = name.rpartition(".")
    owner = network.get_submodule(path)
    whole = owner.get_parameter(kind)
    owner.register_parameter(kind, nn.Parameter(whole.new_empty(shard.shape(whole.shape)), requires_grad=False))


@dataclass(frozen=True)
class Shares:
    """What one rank has of a network.

    Args:
        shards: of the parameters that it has a shard of, by name; it has the others whole.
        gathered: the ranks that bring a block's shards together for its turn (FSDP); None: it computes with its own.
    """

    shards: Mapping[str, Shard] = field(default_factory=dict)
    gathered: Axis | None = None


WHOLE = Shares()


def _common(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
