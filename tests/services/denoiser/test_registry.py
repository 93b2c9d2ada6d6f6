"""Laws of loading onto the ranks of a mesh."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import CheckpointError
from services.common.manifest import load_manifest
from services.denoiser.registry import loaders_over
from services.modeling.loading import load_models
from services.modeling.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")


def _load(manifest: str, mesh: ParallelMesh) -> None:
    load_models(load_manifest(manifest), loaders_over(mesh), CPU)


def test_every_family_can_share_the_rows_of_a_batch(tiny_manifest: str) -> None:
    _load(tiny_manifest, ParallelMesh(cfg=Axis(1, 2)))


def test_a_direction_that_a_family_cannot_be_shared_in_is_named(tiny_manifest: str) -> None:
    mesh = ParallelMesh(ring=Axis(0, 2), fsdp=True)
    with pytest.raises(CheckpointError, match="can't be shared over ranks by ring, fsdp, only by cfg"):
        _load(tiny_manifest, mesh)
