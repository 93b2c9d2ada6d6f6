import pytest
import torch

from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.mesh import ParallelMesh, mesh_of
from tests.support.ranks import on_ranks


def _places(mesh: ParallelMesh) -> tuple[int, int, int, int]:
    return mesh.cfg.rank, mesh.ring.rank, mesh.ulysses.rank, mesh.all_ranks.rank


def test_neighbouring_ranks_differ_in_the_innermost_direction() -> None:
    assert on_ranks(ParallelDegrees(cfg=2, ulysses=2), _places) == [
        (0, 0, 0, 0),
        (0, 0, 1, 1),
        (1, 0, 0, 2),
        (1, 0, 1, 3),
    ]


def _wrong_mesh(mesh: ParallelMesh) -> str:
    with pytest.raises(ValueError, match="has 2 ranks") as caught:
        mesh_of(ParallelDegrees(ring=4), torch.device("cpu"))
    return str(caught.value)


def test_a_group_of_another_size_is_refused() -> None:
    assert "needs 4" in on_ranks(ParallelDegrees(ring=2), _wrong_mesh)[0]
