"""The ranks of a group, ordered by the directions in which they share the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from services.common.parallel_degrees import ParallelDegrees


@dataclass(frozen=True)
class Axis:
    """This rank's place in one direction.

    rank: among those that differ in this direction only.
    size: of them.
    group: to exchange tensors with them; None where there is no other.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelMesh:
    """This rank's place in every direction; see `ParallelDegrees`. `all_ranks`: among all of the group."""

    cfg: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    tensor: Axis = Axis()
    all_ranks: Axis = Axis()
    fsdp: bool = False


ONE_RANK_MESH = ParallelMesh()
"""Of a process without a group."""


def mesh_of(degrees: ParallelDegrees, device: torch.device) -> ParallelMesh:
    """The place of this process, once `torch.distributed` has been initialised with as many ranks.

    Raises:
        ValueError: the group has another number of ranks.
    """
    if distributed.get_world_size() != degrees.ranks:
        raise ValueError(f"the group has {distributed.get_world_size()} ranks; {degrees} needs {degrees.ranks}")
    names, sizes = zip(*degrees.axes().items(), strict=True)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    axes = {
        name: Axis(mesh[name].get_local_rank(), size, mesh[name].get_group()) for name, size in degrees.axes().items()
    }
    everyone = Axis(distributed.get_rank(), degrees.ranks, distributed.group.WORLD)
    return ParallelMesh(**axes, all_ranks=everyone, fsdp=degrees.fsdp)
