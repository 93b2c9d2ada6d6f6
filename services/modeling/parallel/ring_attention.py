"""Attention of tokens that are shared by ranks: keys and values travel round the ring, queries stay.

Paper: Liu et al. 2023, "Ring Attention with Blockwise Transformers", https://arxiv.org/abs/2310.01889. While a rank
attends to one rank's keys it already receives the next ones; after as many turns as there are ranks it has seen all.

Shapes: B batch, T tokens of this rank, W width of the heads together, H heads, D channels of a head.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor, distributed
from torch.distributed import P2POp, Work

from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.partial_attention import PartialAttention, partial_attention


def ring_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, ring: Axis, counts: Sequence[int]) -> Tensor:
    """What this rank's tokens take of all ranks' tokens. q, k and v: [B, T, W] -> [B, T, W].

    counts: tokens of each rank of the ring.
    """
    q_BHTD = _by_head(q, heads)
    parts = (
        partial_attention(q_BHTD, *(_by_head(x, heads) for x in kv))
        for kv in _round(torch.stack([k, v]), ring, counts)
        if kv.shape[2] > 0
    )
    return reduce(PartialAttention.merged, parts).output.to(q.dtype).transpose(1, 2).flatten(2)


def _round(kv: Tensor, ring: Axis, counts: Sequence[int]) -> Iterator[Tensor]:
    """The keys and values [2, B, T, W] of each rank in turn, from this one back; the next arrive meanwhile."""
    for turn in range(1, ring.size):
        coming = kv.new_empty(*kv.shape[:2], counts[(ring.rank - turn) % ring.size], kv.shape[3])
        transfers = _pass_on(kv, coming, ring)
        yield kv
        for transfer in transfers:
            transfer.wait()
        kv = coming
    yield kv


def _pass_on(kv: Tensor, coming: Tensor, ring: Axis) -> list[Work]:
    """Starts to send to the next rank and to receive from the one before."""
    to, source = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    return distributed.batch_isend_irecv(
        [
            P2POp(distributed.isend, kv, group=ring.group, group_peer=to),
            P2POp(distributed.irecv, coming, group=ring.group, group_peer=source),
        ]
    )


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, W] -> [B, H, T, D]."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)
