"""Adapters beside a network's layers: low-rank branches, each computed for the rows of a batch that apply it.

They are hooks that are there for one forward pass: with no adapter, and before and after, the network is as loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from services.modeling.layers import GatedLinear, GeluLinear, Upsample
from services.modeling.lora.adapter import Applied, Change
from services.modeling.lora.maps import Map, map_of
from services.modeling.parallel.shared_linear import SharedLinear

Rows: TypeAlias = slice | list[int]


@dataclass(frozen=True, eq=False)
class _Branch:
    """A change at a scale, for some rows of the batch."""

    change: Change
    scale: float
    rows: Rows

    def add_to(self, output: Tensor, x: Tensor, apply: Map) -> None:
        """Add to a layer's output what the change makes of its input. output: [B, ..., O] or [B, O, H, W]."""
        added = self.change.delta.branch(x[self.rows], apply)
        target = self.change.target
        part = output.narrow(apply.channels, target.start, target.stop - target.start)
        if isinstance(self.rows, slice):
            part[self.rows].add_(added, alpha=self.scale)
        else:
            added = added.expand(len(self.rows), *part.shape[1:])
            part.index_add_(0, torch.tensor(self.rows, device=x.device), added, alpha=self.scale)


@contextmanager
def branches(network: nn.Module, component: str, rows: Sequence[Sequence[Applied]]) -> Iterator[None]:
    """Within it, each row of a forward pass of the network has its adapters applied.

    Args:
        network: whose first dimension is the rows.
        component: that it is, in the adapters.
        rows: what each row applies, in order.
    """
    with ExitStack() as hooks:
        for path, beside in _by_layer(component, rows).items():
            hooks.callback(_hook(network.get_submodule(path), beside).remove)
        yield


def _by_layer(component: str, rows: Sequence[Sequence[Applied]]) -> dict[str, list[_Branch]]:
    """The branches beside each layer; an adapter that several rows apply at one scale is one branch."""
    rows_of: dict[Applied, list[int]] = defaultdict(list)
    for row, applied in enumerate(rows):
        for each in applied:
            rows_of[each].append(row)
    beside: dict[str, list[_Branch]] = defaultdict(list)
    for each, indices in rows_of.items():
        for change in each.adapter.changes.get(component, ()):
            beside[change.target.layer].append(_Branch(change, each.scale, _evenly_spaced(indices)))
    return beside


def _evenly_spaced(rows: list[int]) -> Rows:
    """The rows as a slice, of which torch makes a view, where they are evenly spaced."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    return slice(rows[0], rows[-1] + 1, step) if rows == list(range(rows[0], rows[-1] + 1, step)) else rows


def _hook(layer: nn.Module, beside: Sequence[_Branch]) -> RemovableHandle:
    apply = map_of(layer)
    if isinstance(layer, GatedLinear | GeluLinear | SharedLinear):

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            delta = args[0].new_zeros(*args[0].shape[:-1], len(layer.bias))
            for branch in beside:
                branch.add_to(delta, args[0], apply)
            return args, {**kwargs, "delta": delta}

        return layer.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = F.interpolate(args[0], size=output.shape[-2:]) if isinstance(layer, Upsample) else args[0]
        for branch in beside:
            branch.add_to(output, x, apply)

    return layer.register_forward_hook(after)
