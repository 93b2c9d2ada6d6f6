"""Every kind of change is its formula, written out on dense weights; what does not fit is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.modeling.lora.deltas import Dense, LowRank, WeightDelta
from services.modeling.lora.kinds import Layer, MisfitError, make_delta
from tests.support.lora_files import random_tensor

LINEAR, POINTWISE, CONV = (24, 16), (24, 16, 1, 1), (24, 16, 3, 3)


def layer(shape: tuple[int, ...], weight: Tensor | None = None) -> Layer:
    return Layer(shape, lambda: random_tensor(*shape, seed=77) if weight is None else weight)


def no_alpha(rank: int) -> float:
    return 1.0


def made(shape: tuple[int, ...], **tensors: Tensor) -> WeightDelta:
    return make_delta(tensors, no_alpha, layer(shape))


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random_tensor(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def assert_equal(delta: WeightDelta, expected: Tensor) -> None:
    torch.testing.assert_close(delta.weight(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [LINEAR, POINTWISE, CONV])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_lora_and_locon(shape: tuple[int, ...], alpha: float | None) -> None:
    down, up = numbers((4, *shape[1:]), (24, 4, *[1] * (len(shape) - 2)))
    tensors = {"down": down, "up": up} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    expected = torch.einsum("or,ri...->oi...", up.view(24, 4), down) * (1 if alpha is None else alpha / 4)
    assert_equal(make_delta(tensors, no_alpha, layer(shape)), expected)


def test_the_scale_of_the_file_counts_where_a_layer_has_no_alpha() -> None:
    down, up = numbers((4, 16), (24, 4))
    delta = make_delta({"down": down, "up": up}, lambda rank: 8 / math.sqrt(rank), layer(LINEAR))
    assert_equal(delta, up @ down * 4)


def test_locon_with_a_core_is_a_tucker_decomposition() -> None:
    down, mid, up = numbers((4, 16, 1, 1), (4, 4, 3, 3), (24, 4, 1, 1))
    expected = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert_equal(made(CONV, down=down, mid=mid, up=up), expected)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("rank", [2, 16])
def test_loha_is_a_product_of_two_products(shape: tuple[int, ...], rank: int) -> None:
    a1, b1, a2, b2 = numbers(*((24, rank), (rank, math.prod(shape[1:]))) * 2)
    delta = made(shape, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=torch.tensor(3.0))
    assert_equal(delta, ((a1 @ b1) * (a2 @ b2) * 3 / rank).view(shape))
    assert isinstance(delta, LowRank if rank == 2 else Dense)


def test_loha_with_cores() -> None:
    a1, b1, t1, a2, b2, t2 = numbers(*((4, 24), (4, 16), (4, 4, 3, 3)) * 2)
    delta = made(CONV, hada_w1_a=a1, hada_w1_b=b1, hada_t1=t1, hada_w2_a=a2, hada_w2_b=b2, hada_t2=t2)
    first, second = (torch.einsum("rskl,ro,si->oikl", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    assert_equal(delta, first * second)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lokr_with_whole_factors_takes_no_alpha(shape: tuple[int, ...]) -> None:
    left, right = numbers((4, 2), (6, 8, *shape[2:]))
    delta = made(shape, lokr_w1=left, lokr_w2=right, alpha=torch.tensor(5.0))
    assert_equal(delta, torch.kron(left.view(4, 2, *[1] * (len(shape) - 2)), right))


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lokr_with_factors_of_low_rank(shape: tuple[int, ...]) -> None:
    a1, b1, a2, b2 = numbers((4, 3), (3, 2), (6, 3), (3, math.prod((8, *shape[2:]))))
    delta = made(shape, lokr_w1_a=a1, lokr_w1_b=b1, lokr_w2_a=a2, lokr_w2_b=b2, alpha=torch.tensor(6.0))
    right = (a2 @ b2).view(6, 8, *shape[2:])
    assert_equal(delta, torch.kron((a1 @ b1).view(4, 2, *[1] * (len(shape) - 2)), right) * 2)


def test_lokr_with_a_core() -> None:
    left, a2, b2, core = numbers((4, 2), (3, 6), (3, 8), (3, 3, 3, 3))
    delta = made(CONV, lokr_w1=left, lokr_w2_a=a2, lokr_w2_b=b2, lokr_t2=core)
    right = torch.einsum("rskl,ro,si->oikl", core, a2, b2).contiguous()
    assert_equal(delta, torch.kron(left.view(4, 2, 1, 1), right))


def test_a_difference_is_itself() -> None:
    (change,) = numbers(CONV)
    assert_equal(made(CONV, diff=change), change)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize(("role", "of_columns"), [("magnitude", False), ("dora_scale", False), ("dora_scale", True)])
def test_dora_brings_rows_or_columns_to_their_trained_length(
    shape: tuple[int, ...], role: str, of_columns: bool
) -> None:
    down, up, weight = numbers((4, *shape[1:]), (24, 4), shape)
    ones = [1] * (len(shape) - 2)
    lengths = random_tensor(16 if of_columns else 24, seed=9).abs()
    kept = lengths.view(1, -1, *ones) if of_columns else lengths.view(-1, 1, *ones)
    given = lengths if role == "magnitude" else kept
    delta = make_delta({"down": down, "up": up, role: given}, no_alpha, layer(shape, weight))
    changed = weight + torch.einsum("or,ri...->oi...", up, down)
    dims = tuple(dim for dim in range(len(shape)) if dim != (1 if of_columns else 0))
    assert_equal(delta, changed / changed.pow(2).sum(dims, keepdim=True).sqrt() * kept - weight)


MISFITS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "rank": ({"down": (4, 16), "up": (24, 5)}, "for rank 4"),
    "width in": ({"down": (4, 20), "up": (24, 4)}, r"down is \[4, 20\]"),
    "width out": ({"down": (4, 16), "up": (30, 4)}, r"up is \[30, 4\]"),
    "half": ({"down": (4, 16)}, "has only down"),
    "difference": ({"diff": (24, 17)}, r"diff is \[24, 17\]"),
    "loha": (
        {"hada_w1_a": (24, 4), "hada_w1_b": (4, 17), "hada_w2_a": (24, 4), "hada_w2_b": (4, 16)},
        "hada_w1",
    ),
    "lokr": ({"lokr_w1": (4, 3), "lokr_w2": (6, 8)}, r"must make \[24, 16\]"),
    "lokr's ranks": ({"lokr_w1_a": (4, 3), "lokr_w1_b": (2, 2), "lokr_w2": (6, 8)}, "ranks must be equal"),
    "dora": ({"down": (4, 16), "up": (24, 4), "magnitude": (23,)}, "magnitude has 23 values"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named(misfit: str) -> None:
    shapes, words = MISFITS[misfit]
    tensors = {role: random_tensor(*shape, seed=0) for role, shape in shapes.items()}
    with pytest.raises(MisfitError, match=words):
        make_delta(tensors, no_alpha, layer(LINEAR))


def test_numbers_that_are_not_finite_are_refused() -> None:
    down, up = numbers((4, 16), (24, 4))
    up[3, 1] = math.nan
    with pytest.raises(MisfitError, match="up is not finite"):
        make_delta({"down": down, "up": up}, no_alpha, layer(LINEAR))
