"""Attention of tokens that are shared by ranks: for its time each rank has all tokens and some of the heads.

Paper: Jacobs et al. 2023, "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509. One all-to-all brings queries, keys
and values there, another one brings the outputs back.

Shapes: B batch, T tokens of this rank, N tokens of all ranks, W width of the heads together, U ranks.
"""

from collections.abc import Sequence

from torch import Tensor, distributed

from safelight.errors import CheckpointError
from services.modeling.attention import Attention
from services.modeling.parallel.mesh import Axis, ParallelMesh


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, ulysses: Axis, counts: Sequence[int], attend: Attention
) -> Tensor:
    """What this rank's tokens take of all ranks' tokens. q, k and v: [B, T, W] -> [B, T, W].

    counts: tokens of each rank.
    attend: computes attention for this rank's heads.
    """
    q, k, v = _all_tokens([q, k, v], ulysses, counts)
    return _all_heads(attend(q, k, v, heads // ulysses.size), ulysses, counts)


def check_heads(heads: int, mesh: ParallelMesh) -> None:
    """That the heads of a network can be shared.

    Raises:
        CheckpointError: the ulysses degree does not divide their number.
    """
    if heads % mesh.ulysses.size:
        raise CheckpointError(
            f"{heads} attention heads can't be shared evenly by {mesh.ulysses.size} ranks: choose a ulysses degree "
            f"that divides {heads}, or ring"
        )


def _all_tokens(tensors: Sequence[Tensor], ulysses: Axis, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Each [B, T, W] of this rank's tokens -> [B, N, W/U] of all tokens, for this rank's heads; in one exchange."""
    (batch, tokens, width), ranks = tensors[0].shape, ulysses.size
    leaving = tensors[0].new_empty(ranks, tokens, batch, len(tensors), width // ranks)
    for index, x in enumerate(tensors):
        leaving[:, :, :, index] = x.view(batch, tokens, ranks, width // ranks).permute(2, 1, 0, 3)
    arriving = leaving.new_empty(sum(counts), *leaving.shape[2:])
    distributed.all_to_all_single(arriving, leaving.flatten(0, 1), list(counts), [tokens] * ranks, group=ulysses.group)
    return arriving.permute(2, 1, 0, 3).unbind()


def _all_heads(x: Tensor, ulysses: Axis, counts: Sequence[int]) -> Tensor:
    """[B, N, W/U] of all tokens, for this rank's heads -> [B, T, W] of this rank's tokens."""
    ranks, tokens = ulysses.size, counts[ulysses.rank]
    leaving = x.transpose(0, 1).contiguous()
    arriving = leaving.new_empty(ranks * tokens, *leaving.shape[1:])
    distributed.all_to_all_single(arriving, leaving, [tokens] * ranks, list(counts), group=ulysses.group)
    return arriving.view(ranks, tokens, *leaving.shape[1:]).permute(2, 1, 0, 3).flatten(2)
