"""How a network is made that of one rank of a mesh."""

from __future__ import annotations

from torch import nn

from services.modeling.parallel.fsdp import share_rows
from services.modeling.parallel.mesh import ParallelMesh
from services.modeling.parallel.shards import WHOLE, Shares
from services.modeling.parallel.tensor_parallel import TensorPlan, share_layers
from services.modeling.parallel.ulysses_attention import check_heads


def share(network: nn.Module, mesh: ParallelMesh, plan: TensorPlan, heads: int) -> Shares:
    """Leaves of a whole network, on the meta device, what this rank loads; says what that is.

    Args:
        network: whole.
        mesh: this rank's place.
        plan: of the layers, for the ranks of `mesh.tensor`.
        heads: of the network's attention.

    Raises:
        CheckpointError: the mesh does not divide the heads or a width.
    """
    check_heads(heads, mesh)
    if mesh.tensor.size > 1:
        return Shares(share_layers(network, plan, heads, mesh.tensor))
    if mesh.fsdp and mesh.all_ranks.size > 1:
        return Shares(share_rows(network, mesh.all_ranks), gathered=mesh.all_ranks)
    return WHOLE
