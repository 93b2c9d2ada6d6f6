"""Adapters within a network's weights: the layers that they change, a second time, with the changes added.

The layers as loaded are never written to. Fusing and un-fusing exchange modules, so that the original weights are back
bit for bit; what it costs is the memory of the second layers, which the caller bounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from services.modeling.layers import bias_of, dense_weight, with_weight
from services.modeling.lora.adapter import Applied, Change, SetKey, set_key
from services.modeling.lora.deltas import Offset
from services.modeling.mapped_memory import release_mapped

# Passes that a set has to itself before it is fused, and by how much it must then lead the set that is.
WORTHWHILE_PASSES = 50
_LEAD = 2.0
_KEPT_SETS = 64


@dataclass
class FusionPolicy:
    """Which set is worth fusing: one that many passes were of, and clearly more of late than of the fused one. Pure."""

    _passes: dict[SetKey, float] = field(default_factory=dict)

    def is_due(self, used: SetKey, fused: SetKey | None) -> bool:
        """Count a pass whose rows all apply one set; whether that set should be fused now."""
        self._passes[used] = count = self._passes.pop(used, 0.0) + 1.0
        if count >= 2 * WORTHWHILE_PASSES:
            self._passes = {each: passes / 2 for each, passes in self._passes.items()}
        if len(self._passes) > _KEPT_SETS:
            del self._passes[next(iter(self._passes))]
        return used != fused and count >= max(WORTHWHILE_PASSES, _LEAD * self._passes.get(fused or (), 0.0))


@dataclass(frozen=True, eq=False)
class FusedSet:
    """A set of adapters within copies of the layers that it changes.

    Args:
        key: of the set.
        layers: the copies, by their paths in the network.
    """

    key: SetKey
    layers: Mapping[str, nn.Module]

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Within it, the network computes with the copies."""
        originals = {path: network.get_submodule(path) for path in self.layers}
        try:
            for path, layer in self.layers.items():
                network.set_submodule(path, layer)
            yield
        finally:
            for path, layer in originals.items():
                network.set_submodule(path, layer)


def fuse(network: nn.Module, component: str, applied: Sequence[Applied]) -> FusedSet:
    """The network's layers with the adapters' changes added to their weights, in float32 before the only rounding."""
    layers = {}
    for path, changes in _by_layer(component, applied).items():
        layers[path] = _changed(network.get_submodule(path), changes)
    return FusedSet(set_key(applied), layers)


def _changed(layer: nn.Module, changes: Sequence[tuple[Change, float]]) -> nn.Module:
    base, bias = dense_weight(layer), bias_of(layer)
    weight, offset = base.float().clone(), None if bias is None else bias.float().clone()
    for change, scale in changes:
        rows = slice(change.target.start, change.target.stop)
        if isinstance(change.delta, Offset):
            offset = weight.new_zeros(len(weight)) if offset is None else offset
            offset[rows] += scale * change.delta.change
        else:
            weight[rows] += scale * change.delta.weight()
    release_mapped(base)
    return with_weight(layer, weight.to(base.dtype), None if offset is None else offset.to(base.dtype))


def fused_bytes(network: nn.Module, component: str, applied: Sequence[Applied], dtype: torch.dtype) -> int:
    """Bytes that the copies of `fuse` take."""
    layers = (network.get_submodule(path) for path in _by_layer(component, applied))
    weights = (each for layer in layers for each in layer.parameters() if each.ndim > 1)
    return sum(weight.numel() for weight in weights) * dtype.itemsize


def _by_layer(component: str, applied: Sequence[Applied]) -> dict[str, list[tuple[Change, float]]]:
    """The changes of each layer, with their scales."""
    changes: dict[str, list[tuple[Change, float]]] = defaultdict(list)
    for each in applied:
        for change in each.adapter.changes.get(component, ()):
            changes[change.target.layer].append((change, each.scale))
    return changes
