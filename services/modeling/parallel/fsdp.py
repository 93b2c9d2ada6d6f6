"""Blocks whose weights lie on all ranks, a part on each, and are brought together for each block's turn.

Zhao et al. 2023, "PyTorch FSDP", https://arxiv.org/abs/2304.11277. It is a way of streaming (weight_streaming.py): two
slots, and one block ahead of the computation; only that a block comes from the ranks of a group, not from host memory.
torch's own FSDP2 knows no slots: it allocates each block and copies it once more out of what was gathered.

Matrices are cut by rows, so that each is gathered into its place in the slot and is whole there. Vectors, which are
small, and what can't be cut evenly every rank has whole. What a rank has may also lie in its host memory while the
network has no work (offload); it comes to the device on its way to the others then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from services.modeling.block_weights import FlatLayout
from services.modeling.float8 import stored_parameters
from services.modeling.parallel.gathering import all_gather
from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.shards import Shard, even_shard, leave_shard
from services.modeling.residency import Residency
from services.modeling.weight_streaming import OffloadedWeights, WeightBlock
from services.modeling.weight_transfer import Transfer


def share_rows(network: nn.Module, axis: Axis) -> dict[str, Shard]:
    """Leaves of each matrix of a whole network, on the meta device, one rank's rows; says which they are."""
    shards = {}
    for name, parameter in list(network.named_parameters()):
        if parameter.ndim > 1 and len(parameter) % axis.size == 0:
            shards[name] = even_shard(0, [len(parameter)], axis)
            leave_shard(network, name, shards[name])
    return shards


def gathered_weights(
    network: nn.Module,
    by_rows: Collection[str],
    axis: Axis,
    blocks: Sequence[WeightBlock],
    transfer: Transfer,
    *,
    offloads: bool,
) -> OffloadedWeights:
    """The weights of a network that was loaded by rows, gathered from here on for each block's turn.

    Every rank of the axis must compute the same blocks in the same order, as often as the others, and leave with them.

    Args:
        network: loaded.
        by_rows: names of the parameters of which each rank has rows.
        axis: of the ranks.
        blocks: see `OffloadedWeights`.
        transfer: see `OffloadedWeights`.
        offloads: what a rank has lies in host memory, and nothing is on the device while the network has no work.
    """
    stored = {
        parameter
        for path, _, kind in (name.rpartition(".") for name in by_rows)
        for parameter in stored_parameters(network.get_submodule(path), kind)
    }
    flatten = partial(RowsOfWeights, axis, stored, home_on_device=not offloads)
    return OffloadedWeights(blocks, Residency(budget_bytes=0, leaves_when_idle=offloads), transfer, flatten)


class RowsOfWeights:
    """A block's parameters, of some of which this rank keeps rows, as one stretch of memory.

    Args:
        axis: of the ranks that have the other rows.
        by_rows: those parameters.
        name: of the block.
        parameters: of the block, as this rank keeps them.
        home_on_device: where that memory is.
    """

    def __init__(
        self,
        axis: Axis,
        by_rows: Collection[nn.Parameter],
        name: str,
        parameters: Sequence[nn.Parameter],
        *,
        home_on_device: bool,
    ) -> None:
        self.name, self.home_on_device = name, home_on_device
        self._axis, self._parameters = axis, parameters
        self._kept = FlatLayout(parameters)
        self._whole = FlatLayout([_whole(each, axis.size) if each in by_rows else each for each in parameters])
        self.size, self.home_size = self._whole.size, self._kept.size

    def settle(self, home: Tensor) -> None:
        """Copy what this rank keeps to its home, for good."""
        self._kept.move(self._parameters, home)

    def show(self, room: Tensor) -> None:
        """Make the parameters those that were gathered in a room."""
        self._whole.show(self._parameters, room)

    def retire(self, home: Tensor) -> None:
        """Make the parameters what this rank keeps."""
        self._kept.show(self._parameters, home)

    def fetch(self, home: Tensor, room: Tensor) -> None:
        """Gather each parameter, with all ranks, into its place."""
        on_device = home.to(room.device, non_blocking=True)
        for kept, whole in zip(self._kept.stretches(on_device), self._whole.stretches(room), strict=True):
            if kept.numel() == whole.numel():
                whole.copy_(kept, non_blocking=True)
            else:
                all_gather(whole, kept, self._axis)


def _whole(rows: Tensor, ranks: int) -> Tensor:
    """Of the whole matrix, the shape and the dtype."""
    return torch.empty(ranks * len(rows), *rows.shape[1:], dtype=rows.dtype, device="meta")
