"""Laws of attention between tokens that ranks share: it is attention, whatever the plan and the lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import CheckpointError
from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.mesh import ONE_RANK_MESH, Axis, ParallelMesh, mesh_of
from services.modeling.parallel.partial_attention import PartialAttention, partial_attention, plain_partial_attention
from services.modeling.parallel.token_split import TokenSplit
from services.modeling.parallel.ulysses_attention import check_heads
from tests.support.ranks import on_ranks
from tests.support.traffic import SentBytes

CPU = torch.device("cpu")
HEADS, HEAD_WIDTH, BATCH = 4, 8, 2
PLANS = {
    "ulysses 2": ParallelDegrees(cfg=2, ulysses=2),
    "ring 2": ParallelDegrees(cfg=2, ring=2),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses=2, ring=2),
    "ulysses 4": ParallelDegrees(ulysses=4),
    "ring 4": ParallelDegrees(ring=4),
}
LENGTHS = {"even": (8, 16), "uneven": (7, 15), "of one sequence": (13,), "fewer than ranks": (1, 1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
Case = tuple[str, str, str]


def _tokens(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, length, HEADS * HEAD_WIDTH, generator=generator) for length in lengths]


def _expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], HEADS, HEAD_WIDTH).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _error(mesh: ParallelMesh, lengths: tuple[int, ...], dtype: torch.dtype) -> float:
    """The largest difference between attention of shared tokens, gathered, and torch's own of all."""
    split = TokenSplit(mesh, lengths)
    q, k, v = (torch.cat(_tokens(lengths, seed), dim=1).to(dtype) for seed in range(3))
    expected = _expected(q.float(), k.float(), v.float())
    q, k, v = (split.joint_part(x, dim=1) for x in (q, k, v))
    runs = torch.split(split.attention()(q, k, v, HEADS), [split.part(x).shape[1] for x in _tokens(lengths, 0)], dim=1)
    gathered = torch.cat([split.whole(run, sequence) for sequence, run in enumerate(runs)], dim=1)
    return float((gathered - expected).abs().max() / expected.abs().max())


def _sent_bytes(mesh: ParallelMesh) -> int:
    """What this rank sends for the attention of all tokens."""
    split = TokenSplit(mesh, LENGTHS["even"])
    own = split.joint_part(torch.cat(_tokens(split.lengths, 0), dim=1), dim=1)
    sent = SentBytes()
    with sent:
        split.attention()(own, own, own, HEADS)
    return sent.total


def _measure(_: ParallelMesh) -> tuple[dict[Case, float], dict[str, int]]:
    meshes = {plan: mesh_of(degrees, CPU) for plan, degrees in PLANS.items()}
    errors = {
        (plan, lengths, dtype): _error(meshes[plan], LENGTHS[lengths], DTYPES[dtype])
        for plan, lengths, dtype in product(PLANS, LENGTHS, DTYPES)
    }
    return errors, {plan: _sent_bytes(mesh) for plan, mesh in meshes.items()}


@cache
def _of_all_ranks() -> list[tuple[dict[Case, float], dict[str, int]]]:
    """One group of four processes for all cases: each rank's errors, and the bytes that it sent."""
    return on_ranks(ParallelDegrees(ring=4), _measure)


@pytest.mark.parametrize("case", list(product(PLANS, LENGTHS, DTYPES)), ids=", ".join)
def test_attention_of_shared_tokens_equals_torch_s_of_all(case: Case) -> None:
    assert max(errors[case] for errors, _ in _of_all_ranks()) < TOLERANCES[case[2]]


@pytest.mark.parametrize("plan", PLANS)
def test_what_travels_is_what_the_documents_say(plan: str) -> None:
    """docs/models.md: of one tensor of all tokens, 4 (U - 1) / (U² R) by Ulysses and 2 (R - 1) / (U R) by the ring."""
    ulysses, ring = PLANS[plan].ulysses, PLANS[plan].ring
    tensor = 4 * BATCH * sum(LENGTHS["even"]) * HEADS * HEAD_WIDTH
    expected = tensor * (4 * (ulysses - 1) / ulysses + 2 * (ring - 1)) / (ulysses * ring)
    assert {sent[plan] for _, sent in _of_all_ranks()} == {expected}


def test_one_rank_keeps_the_tensors_that_it_has() -> None:
    (x,) = _tokens((6,), 0)
    split = TokenSplit(ONE_RANK_MESH, (6,))
    same = [split.part(x), split.joint_part(x, dim=1), split.whole(x)]
    assert {each.data_ptr() for each in same} == {x.data_ptr()}


@pytest.mark.parametrize("attend", [partial_attention, plain_partial_attention])
def test_parts_of_the_keys_make_the_whole(attend: Callable[[Tensor, Tensor, Tensor], PartialAttention]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3))
    parts = [attend(q, k[:, :, keys], v[:, :, keys]) for keys in (slice(2), slice(2, 6), slice(6, 9))]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert torch.allclose(merged.output, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert torch.allclose(merged.logsumexp, torch.logsumexp(q @ k.mT / 4, dim=-1), atol=1e-5)


def test_heads_that_the_ulysses_degree_does_not_divide_are_refused() -> None:
    with pytest.raises(CheckpointError, match="12 attention heads can't be shared evenly by 8 ranks"):
        check_heads(12, ParallelMesh(ulysses=Axis(0, 8)))
