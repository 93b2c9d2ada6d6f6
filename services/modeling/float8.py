"""Matrices stored in eight bits (float8_e4m3fn: 3 bits of mantissa, up to 448) and brought back for each use.

Every output row has a scale, a power of two, so that its largest weight comes near 448. Multiplying with it is exact: a
network stored so computes, bit for bit, what it would with its weights rounded. A weight is off by a sixteenth of
itself at most or, where it is less than 2^-13 of its row's largest, by 2^-17 of that.

Only matrices of some size are stored so. Norms, biases, embeddings and modulation keep their dtype: together they are
small, and an error in them goes to every position.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from services.modeling.mapped_memory import release_mapped

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0
_MIN_MATRIX_ELEMENTS = 2**12  # less would save less than its scales and one kernel more cost


class Float8Weight(nn.Module):
    """A layer's weight as a function of what is stored of it (torch.nn.utils.parametrize)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, stored: Tensor, scale: Tensor) -> Tensor:
        """stored: float8 [out, ...], scale: [out, 1, ...] in the dtype -> the weight [out, ...] in the dtype."""
        return stored.to(self._dtype).mul_(scale)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored of a weight; one in float8 already stays as it is."""
        rows = (len(weight), *[1] * (weight.ndim - 1))
        if weight.dtype == FLOAT8:
            return weight, weight.new_ones(rows, dtype=self._dtype)
        scale = row_scales(weight).view(rows)
        return (weight / scale).to(FLOAT8), scale.to(self._dtype)  # divided in float32: the scale's dtype


def row_scales(weight: Tensor) -> Tensor:
    """The least power of two for each row, [out, ...] -> [out] in float32, that brings it down to float8's range."""
    largest = weight.abs().flatten(1).amax(1).float()
    return torch.exp2(torch.ceil(torch.log2(largest / _LARGEST))).clamp_(min=2.0**-24).where(largest > 0, 1.0)


def store_as_float8(network: nn.Module, dtype: torch.dtype, exempt: Iterable[nn.Module] = ()) -> None:
    """Keep the large matrices of linear maps and convolutions in eight bits from here on, but those of `exempt`.

    Args:
        network: its other weights are in `dtype`.
        dtype: in which the matrices are read.
        exempt: modules whose layers stay in `dtype`; a matrix of theirs that is in float8 already is converted.
    """
    kept = {layer for module in exempt for layer in module.modules()}
    for layer in list(network.modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if layer in kept or layer.weight.numel() < _MIN_MATRIX_ELEMENTS:
            layer.to(dtype)
        else:
            loaded = layer.weight
            parametrize.register_parametrization(layer, "weight", Float8Weight(dtype), unsafe=True)
            release_mapped(loaded)
    network.requires_grad_(False)


def stored_parameters(layer: nn.Module, name: str) -> list[nn.Parameter]:
    """What is stored of a layer's parameter: itself, or the numbers in eight bits and their scales."""
    if parametrize.is_parametrized(layer, name):
        return list(layer.get_submodule(f"parametrizations.{name}").parameters())
    return [layer.get_parameter(name)]


def is_stored_as_float8(layer: nn.Module) -> bool:
    """Whether the layer's weight is brought back for each use."""
    return parametrize.is_parametrized(layer, "weight")
