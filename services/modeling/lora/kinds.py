"""From a layer's tensors in a LoRA's file to the change of its weight: LoRA, LoCon, LoHa, LoKr, DoRA.

Papers: LoRA, Hu et al. 2021 (arXiv 2106.09685); LoHa, Hyeon-Woo et al. 2022 (2108.06098, "FedPara"); LoCon and LoKr,
Yeh et al. 2024 (2309.14859, "LyCORIS", also the reference code); DoRA, Liu et al. 2024 (2402.09353).

Shapes: O and I the layer's widths out and in, K its kernel's sides (none for a linear layer), R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import truediv

import torch
from torch import Tensor

from services.modeling.lora.deltas import Dense, Kronecker, LowRank, Offset, WeightDelta
from services.modeling.lora.layouts import Role

Shape = tuple[int, ...]
Scale = Callable[[int], float]
"""What a change is multiplied with, by its rank."""

BIAS: Role = "diff_b"
"""The role that is for `make_offset`, all others being for `make_delta`."""


class MisfitError(ValueError):
    """The tensors do not fit each other, or the layer; the message says how."""


@dataclass(frozen=True)
class Layer:
    """The layer that a change is for.

    Args:
        shape: of its weight, [O, I, *K]; of a part of a fused layer, that part's.
        weight: gives the weight in float32; asked for by DoRA only.
    """

    shape: Shape
    weight: Callable[[], Tensor]


def make_delta(tensors: Mapping[Role, Tensor], scale: Scale, layer: Layer) -> WeightDelta:
    """The change that a layer's tensors stand for, in float32, with its scale taken into it.

    Args:
        tensors: of the layer, by their roles.
        scale: by the rank; a layer with a tensor `alpha` has alpha / rank in its place.
        layer: what is changed.

    Raises:
        MisfitError: they do not make a change of this layer's shape.
    """
    tensors = {role: _finite(tensor, role) for role, tensor in tensors.items()}
    if "alpha" in tensors:
        scale = partial(truediv, tensors["alpha"].item())
    delta = _undecomposed(tensors, scale, layer.shape)
    if kept := _lengths_kept(tensors, layer.shape):
        return _decomposed(delta, *kept, layer.weight())
    return delta


def make_offset(difference: Tensor, layer: Layer) -> Offset:
    """The change of a layer's bias, in float32; alpha and rank are not of it.

    Raises:
        MisfitError: it is not one of this layer's.
    """
    if difference.numel() != layer.shape[0]:
        raise MisfitError(f"{BIAS} is {list(difference.shape)}; must be [{layer.shape[0]}]")
    return Offset(_finite(difference, BIAS).flatten())


def _finite(tensor: Tensor, role: Role) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise MisfitError(f"{role} is not finite")
    return tensor.float()


def _undecomposed(tensors: Mapping[Role, Tensor], scale: Scale, shape: Shape) -> WeightDelta:
    """The change by the product of the tensors, without DoRA's magnitude."""
    for kind, needed in _KINDS:
        if tensors.keys() >= needed:
            return kind(tensors, scale, shape)
    raise MisfitError(f"has only {', '.join(sorted(tensors))}, which make no change")


def _low_rank(tensors: Mapping[Role, Tensor], scale: Scale, shape: Shape) -> WeightDelta:
    """LoRA, and LoCon where the layer is a convolution; with `mid`, the kernel is a Tucker decomposition's."""
    down, up = tensors["down"], tensors["up"]
    rank = len(down)
    if "mid" in tensors:
        down = torch.einsum("rskl,si->rikl", tensors["mid"], _matrix(down, "down"))
        rank = len(tensors["mid"])
    if up.numel() != shape[0] * rank:
        raise MisfitError(f"up is {list(up.shape)}; for rank {rank} it must be [{shape[0]}, {rank}]")
    down = _shaped(down, (rank, *shape[1:]), "down")
    return LowRank(down, up.reshape(shape[0], rank) * scale(rank))


def _hadamard(tensors: Mapping[Role, Tensor], scale: Scale, shape: Shape) -> WeightDelta:
    """LoHa: the product, element by element, of two changes of low rank.

    It is itself a change of rank R² at most, (a1 ⊙ a2)(b1 ⊙ b2) over all pairs of ranks; computed so where that is
    shorter than the matrix.
    """
    a1, b1, a2, b2 = tensors["hada_w1_a"], tensors["hada_w1_b"], tensors["hada_w2_a"], tensors["hada_w2_b"]
    factor = scale(len(b1))
    if "hada_t1" in tensors:
        return Dense(_shaped(_tucker(tensors["hada_t1"], a1, b1) * _tucker(tensors["hada_t2"], a2, b2) * factor, shape))
    _check_product(a1, b1, shape, "hada_w1")
    _check_product(a2, b2, shape, "hada_w2")
    if len(b1) * len(b2) * (shape[0] + b1.shape[1]) >= math.prod(shape):
        return Dense(((a1 @ b1) * (a2 @ b2) * factor).view(shape))
    up = torch.einsum("or,os->ors", a1, a2).flatten(1)
    down = torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)
    return LowRank(down.view(-1, *shape[1:]), up * factor)


def _kronecker(tensors: Mapping[Role, Tensor], scale: Scale, shape: Shape) -> WeightDelta:
    """LoKr: a Kronecker product, of which either factor may be of low rank; alpha counts only if one is."""
    left, left_rank = _factor(tensors, "lokr_w1")
    right, right_rank = _factor(tensors, "lokr_w2")
    rank = left_rank or right_rank
    right = right.flatten(1) if math.prod(right.shape[2:]) == 1 else right
    if right.ndim == 2 and right.shape[1] % math.prod(shape[2:]) == 0:
        right = right.view(len(right), -1, *shape[2:])
    fits = left.ndim == 2 and right.ndim == len(shape)
    if not fits or (len(left) * len(right), left.shape[1] * right.shape[1], *right.shape[2:]) != shape:
        raise MisfitError(f"is a product of {list(left.shape)} and {list(right.shape)}; must make {list(shape)}")
    return Kronecker(left * (scale(rank) if rank else 1.0), right)


def _difference(tensors: Mapping[Role, Tensor], scale: Scale, shape: Shape) -> WeightDelta:
    """The whole change, as it is."""
    return Dense(_shaped(tensors["diff"], shape, "diff"))


_Kind = Callable[[Mapping[Role, Tensor], Scale, Shape], WeightDelta]
_KINDS: tuple[tuple[_Kind, frozenset[str]], ...] = (
    (_low_rank, frozenset({"down", "up"})),
    (_hadamard, frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})),
    (_kronecker, frozenset({"lokr_w1", "lokr_w2"})),
    (_kronecker, frozenset({"lokr_w1", "lokr_w2_b"})),
    (_kronecker, frozenset({"lokr_w1_b", "lokr_w2"})),
    (_kronecker, frozenset({"lokr_w1_b", "lokr_w2_b"})),
    (_difference, frozenset({"diff"})),
)


def _lengths_kept(tensors: Mapping[Role, Tensor], shape: Shape) -> tuple[Tensor, int] | None:
    """DoRA's lengths, and the dimension of the weight that they are of: 0 its rows, 1 its columns; None: no DoRA."""
    if "magnitude" in tensors:
        lengths, kept = tensors["magnitude"], 0
    elif "dora_scale" in tensors:
        lengths = tensors["dora_scale"]  # LyCORIS': [O, 1, ...], or [1, I, ...] of files without `wd_on_output`
        kept = int(lengths.ndim > 1 and len(lengths) == 1 and lengths.shape[1] == shape[1])
    else:
        return None
    if lengths.numel() != shape[kept]:
        raise MisfitError(f"DoRA's magnitude has {lengths.numel()} values; must have {shape[kept]}")
    return lengths, kept


def _decomposed(delta: WeightDelta, magnitude: Tensor, kept: int, weight: Tensor) -> Dense:
    """DoRA: the changed weight W + Δ, each row or column of it brought to its trained length, less W.

    Scaled by s it leads from W to the trained weight in a straight line; at s = 1 it is the paper's.
    """
    changed = weight + delta.weight()
    dims = [dim for dim in range(weight.ndim) if dim != kept]
    lengths = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
    return Dense(changed * (magnitude.reshape(lengths.shape) / lengths) - weight)


def _factor(tensors: Mapping[Role, Tensor], name: str) -> tuple[Tensor, int | None]:
    """One factor of LoKr, and its rank if it is a product itself."""
    by_name: Mapping[str, Tensor] = {str(role): tensor for role, tensor in tensors.items()}
    if name in by_name:
        return by_name[name], None
    a, b = by_name[f"{name}_a"], by_name[f"{name}_b"]
    if "lokr_t2" in tensors and name == "lokr_w2":
        return _tucker(tensors["lokr_t2"], a, b), len(b)
    if a.shape[1] != len(b):
        raise MisfitError(f"{name}_a is {list(a.shape)} and {name}_b {list(b.shape)}; their ranks must be equal")
    return (a @ b.flatten(1)).view(len(a), *b.shape[1:]), len(b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core: [R, R, *K], a: [R, O], b: [R, I] -> [O, I, *K]."""
    if core.shape[:2] != (len(a), len(b)):
        raise MisfitError(f"a core of {list(core.shape)} does not fit factors of {list(a.shape)} and {list(b.shape)}")
    return torch.einsum("rs...,ro,si->oi...", core, a, b)


def _check_product(a: Tensor, b: Tensor, shape: Shape, name: str) -> None:
    wanted = (shape[0], math.prod(shape[1:]))
    if a.shape[1] != len(b) or (len(a), b.shape[1]) != wanted:
        raise MisfitError(f"{name} is {list(a.shape)} times {list(b.shape)}; must make {list(wanted)}")


def _matrix(tensor: Tensor, name: str) -> Tensor:
    """[A, B, 1, 1] as [A, B]."""
    if math.prod(tensor.shape[2:]) != 1:
        raise MisfitError(f"{name} is {list(tensor.shape)}; must be a matrix")
    return tensor.flatten(1)


def _shaped(tensor: Tensor, shape: Shape, name: str = "the change") -> Tensor:
    """The tensor in a layer's shape: 1 x 1 convolutions and linear layers stand for each other."""
    if _folded(tuple(tensor.shape)) != _folded(shape):
        raise MisfitError(f"{name} is {list(tensor.shape)}; must be {list(shape)}")
    return tensor.reshape(shape)


def _folded(shape: Shape) -> Shape:
    """The shape without a kernel of one element."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
