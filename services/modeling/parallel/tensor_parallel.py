"""Layers of which each rank has some rows or columns (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

A pair of layers is shared with one exchange: the first by its outputs, so that each rank has some heads, or some hidden
channels, to itself, and the second by its inputs, whose partial products are then summed over the ranks. A large layer
that sees few rows, as modulation does, is shared alone, and its outputs are gathered. Which layers those are is a plan,
data beside the model. What it does not name every rank has whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import nn

from safelight.errors import CheckpointError
from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.shards import Shard, even_shard, leave_shard
from services.modeling.parallel.shared_linear import GatheredLinear, SharedLinear, SummedLinear

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


@dataclass(frozen=True)
class Gathered:
    """A layer of which each rank has rows, and whose outputs are gathered: for layers that see few rows of input."""

    parts: ClassVar[tuple[int, ...]] = (1,)


Split: TypeAlias = ByOutputs | ByInputs | Gathered
TensorPlan: TypeAlias = Mapping[str, Split]
"""By the names of layers, or of parameters; `{}` stands for the number of a block."""


_LAYERS: Mapping[type[Split], type[SharedLinear]] = {ByInputs: SummedLinear, Gathered: GatheredLinear}


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
        if kind == "weight" and (exchanging := _LAYERS.get(type(split))):
            network.set_submodule(path, exchanging(_linear(network, path), axis))
    return shards


def _shard(name: str, shape: torch.Size, split: Split, axis: Axis) -> Shard:
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
