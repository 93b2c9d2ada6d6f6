"""Laws of shards: together they are the whole, they are cut as the parts of a layer are, and only they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.fsdp import share_rows
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.parallel.shards import Shares, even_shard
from services.modeling.weights import load_weights, open_checkpoint
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
WIDTH, HEIGHT = 1024, 512


def _shards(whole: Tensor, dim: int, parts: list[int], ranks: int) -> list[Tensor]:
    return [torch.cat(even_shard(dim, parts, Axis(rank, ranks)).of([whole])) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_shards_of_all_ranks_are_the_whole_part_by_part(dim: int, ranks: int) -> None:
    whole, parts = torch.randn(24, 24), [4, 8, 12]
    shards = [torch.split(shard, [part // ranks for part in parts], dim) for shard in _shards(whole, dim, parts, ranks)]
    joined = [torch.cat(of_all_ranks, dim) for of_all_ranks in zip(*shards, strict=True)]
    assert torch.equal(torch.cat(joined, dim), whole)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_several_tensors_make_is_cut_as_the_joined_one(dim: int) -> None:
    tensors, shard = [torch.randn(height, 12) for height in (5, 1, 6)], even_shard(dim, [4, 8], Axis(1, 2))
    assert torch.equal(torch.cat(shard.of(tensors)), torch.cat(shard.of([torch.cat(tensors)])))


@pytest.mark.parametrize("span", [(0, 12), (1, 3), (5, 11), (2, 4)])
def test_a_span_is_found_where_the_shard_has_it(span: tuple[int, int]) -> None:
    rows, shard = torch.arange(12), even_shard(0, [4, 8], Axis(1, 2))
    (held,) = [torch.cat(shard.of([rows]))]
    found = [(rows[slice(*common)], held[at : at + common[1] - common[0]]) for common, at in shard.within(span)]
    assert all(torch.equal(expected, actual) for expected, actual in found)
    assert sum(len(expected) for expected, _ in found) == sum(int(row) in range(*span) for row in held)


def _load_from_a_file_that_ends_after_the_shard(mesh: ParallelMesh, file: Path) -> Tensor | None:
    if mesh.all_ranks.rank:
        return None
    checkpoint = open_checkpoint(file)
    size = file.stat().st_size
    os.truncate(file, size - HEIGHT * WIDTH * 4 // 2 + os.sysconf("SC_PAGESIZE"))  # a read beyond it ends the process
    with torch.device("meta"):
        module = nn.Linear(WIDTH, HEIGHT, bias=False)
        shares = Shares(share_rows(module, mesh.all_ranks), mesh.all_ranks)
    load_weights(module, checkpoint, {"weight": ("weight",)}, device=CPU, dtype=torch.bfloat16, shares=shares)
    return module.weight.detach().clone()


def test_only_the_shard_is_read(tmp_path: Path) -> None:
    whole = torch.randn(HEIGHT, WIDTH)
    save_file({"weight": whole}, tmp_path / "weights.safetensors")
    degrees = ParallelDegrees(cfg=2, fsdp=True)
    first, _ = on_ranks(degrees, _load_from_a_file_that_ends_after_the_shard, tmp_path / "weights.safetensors")
    assert torch.equal(first, whole[: HEIGHT // 2].bfloat16())
