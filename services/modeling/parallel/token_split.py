"""Sequence parallelism: the tokens of a forward pass are shared by ranks, which meet in attention alone.

A network cuts what has a row for each token with `part`, hands `attention` to the blocks, and joins with `whole` what
comes out of the last layer. Everything between is done token by token, and knows nothing of it.

Ulysses and ring go together as in Fang and Zhao 2024, "USP", https://arxiv.org/abs/2405.07719: Ulysses among
neighbours, so that its exchanges stay within a machine, and the ring around their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from services.modeling.attention import Attention, attention
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.parallel.ring_attention import ring_attention
from services.modeling.parallel.ulysses_attention import ulysses_attention


@dataclass(frozen=True)
class TokenSplit:
    """Which tokens lie on which rank in one forward pass.

    Of every sequence each rank has a run, in the order of ranks. Runs differ by one token at most, so that there is
    nothing to pad and nothing to mask. On one rank all of this is the identity, and copies nothing.

    mesh: whose ring and ulysses directions share the tokens.
    lengths: tokens of each sequence; all of them attend to all.
    """

    mesh: ParallelMesh
    lengths: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """That share the tokens."""
        return self.mesh.ring.size * self.mesh.ulysses.size

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's run of a sequence that lies along `dim`."""
        place = self.mesh.ring.rank * self.mesh.ulysses.size + self.mesh.ulysses.rank
        return x.tensor_split(self.ranks, dim)[place]

    def joint_part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's runs of all sequences, which lie along `dim` one after the other."""
        if self.ranks == 1:
            return x
        return torch.cat([self.part(sequence, dim) for sequence in torch.split(x, list(self.lengths), dim)], dim)

    def whole(self, part: Tensor, sequence: int = 0) -> Tensor:
        """The sequence of this number, [B, length, W], of the runs that all ranks have of it."""
        runs = self._by_ring(_runs(self.lengths[sequence], self.ranks))
        in_group = _gather(part, self.mesh.ulysses, runs[self.mesh.ring.rank])
        return _gather(in_group, self.mesh.ring, [sum(group) for group in runs])

    def attention(self) -> Attention:
        """What this rank's tokens take of all tokens, with queries, keys and values of its own tokens."""
        ring, ulysses = self.mesh.ring, self.mesh.ulysses
        runs = zip(*(_runs(length, self.ranks) for length in self.lengths), strict=True)
        counts = self._by_ring([sum(of_rank) for of_rank in runs])
        of_groups = [sum(group) for group in counts]
        attend = attention if ring.size == 1 else partial(ring_attention, ring=ring, counts=of_groups)
        if ulysses.size == 1:
            return attend
        return partial(ulysses_attention, ulysses=ulysses, counts=counts[ring.rank], attend=attend)

    def _by_ring(self, of_ranks: Sequence[int]) -> list[Sequence[int]]:
        """Numbers of all ranks, those of each ring rank's ulysses group together."""
        size = self.mesh.ulysses.size
        return [of_ranks[start : start + size] for start in range(0, len(of_ranks), size)]


def _runs(length: int, ranks: int) -> list[int]:
    """Tokens of each rank, as `Tensor.tensor_split` has it."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


def _gather(part: Tensor, axis: Axis, counts: Sequence[int]) -> Tensor:
    """[B, T, W] of each rank -> [B, N, W] of all. counts: tokens of each; shorter ones are padded on their way."""
    if axis.size == 1:
        return part
    padded = F.pad(part, (0, 0, 0, max(counts) - part.shape[1])).contiguous()
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded, group=axis.group)
    return torch.cat([x[:, :count] for x, count in zip(gathered, counts, strict=True)], dim=1)
