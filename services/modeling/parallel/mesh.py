"""The ranks of a group, ordered by the directions in which they share the work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
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

    def shared_directions(self) -> list[str]:
        """The names of the directions in which ranks share one network; with none, each has a whole one of its own."""
        axes = {"ring": self.ring, "ulysses": self.ulysses, "tensor": self.tensor}
        return [name for name, axis in axes.items() if axis.size > 1] + ["fsdp"] * self.fsdp


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


def check_directions(entry: ModelEntry, mesh: ParallelMesh, supported: Collection[str]) -> None:
    """That a model's network can be shared as the mesh asks for.

    Raises:
        CheckpointError: in a direction beyond those that its family supports.
    """
    beyond = [name for name in mesh.shared_directions() if name not in supported]
    if beyond:
        raise CheckpointError(
            f"model {entry.name!r}: its family can't be shared over ranks by {', '.join(beyond)}, only by "
            f"{', '.join(('cfg', *supported))}: change the model's parallel degrees"
        )
