"""Layers of which each rank has some rows or columns (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

A pair of layers is shared with one exchange: the first by its outputs, so that each rank has some heads, or some hidden
channels, to itself, and the second by its inputs, whose partial products are then summed over the ranks. Which layers
those are is a plan, data beside the model. What it does not name every rank has whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from safelight.errors import CheckpointError
from services.modeling.layers import Linear
from services.modeling.packing import packed_linear
from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.shards import Shard, even_shard, leave_shard

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ByOutputs:
    """A layer, or a parameter of its own, of which each rank has rows: Megatron's column-parallel one.

    Args:
        parts: the relative widths of what lies side by side in the outputs (queries, keys and values); each is shared.
    """

    parts: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class ByInputs:
    """A layer of which each rank has columns, and which sums over the ranks: Megatron's row-parallel one.

    Args:
        parts: the relative widths of what lies side by side in the inputs; each is shared.
    """

    parts: tuple[int, ...] = (1,)


TensorPlan: TypeAlias = Mapping[str, ByOutputs | ByInputs]
"""By the names of layers, or of parameters; `{}` stands for the number of a block."""


class SummedLinear(Linear):
    """x Wᵀ + b (+ residual) where each rank of an axis has some of x's channels. x: [..., in / ranks] -> [..., out].

    The bias is added by the first rank, and the residual to the sum.
    """

    def __init__(self, whole: nn.Linear, axis: Axis) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias, self._axis = whole.weight, whole.bias, axis

    def forward(self, x: Tensor, residual: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        """delta: [..., out], this rank's part of what is added to the product."""
        weight, bias = self.weight, self.bias if self._axis.rank == 0 else None
        if weight.is_mkldnn:
            y = packed_linear(x, weight, bias, add=delta)
        else:
            y = F.linear(x, weight, bias)
            y = y if delta is None else y + delta
        distributed.all_reduce(y, group=self._axis.group)
        return y if residual is None else y + residual


def share_layers(network: nn.Module, plan: TensorPlan, heads: int, axis: Axis) -> dict[str, Shard]:
    """Makes of a whole network, on the meta device, that of one rank; what it has of each parameter that is shared.

    A layer's `in_features` and `out_features` stay those of the whole layer.

    Args:
        network: whole.
        plan: how.
        heads: of its attention.
        axis: of the ranks.

    Raises:
        CheckpointError: the axis does not divide the heads, or a width.
    """
    if heads % axis.size:
        raise CheckpointError(
            f"a {type(network).__name__} of {heads} heads can't be shared by {axis.size} ranks: choose a parallel "
            "degree 'tensor' that divides them"
        )
    shards = {}
    for name, parameter in list(network.named_parameters()):
        path, _, kind = name.rpartition(".")
        split = plan.get(_template(path)) or plan.get(_template(name))
        if split is None or (isinstance(split, ByInputs) and kind == "bias"):
            continue
        shards[name] = shard = _shard(name, parameter.shape, split, axis)
        leave_shard(network, name, shard)
        if isinstance(split, ByInputs):
            network.set_submodule(path, SummedLinear(_linear(network, path), axis))
    return shards


def _shard(name: str, shape: torch.Size, split: ByOutputs | ByInputs, axis: Axis) -> Shard:
    dim = int(isinstance(split, ByInputs))
    unit, rest = divmod(shape[dim], sum(split.parts))
    parts = [unit * part for part in split.parts]
    if rest or any(part % axis.size for part in parts):
        raise CheckpointError(
            f"{name} has {shape[dim]} {('rows', 'columns')[dim]}, which {axis.size} ranks can't share: choose another "
            "parallel degree 'tensor'"
        )
    return even_shard(dim, parts, axis)


def _linear(network: nn.Module, path: str) -> nn.Linear:
    layer = network.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


def _template(name: str) -> str:
    return _NUMBER.sub("{}", name)
