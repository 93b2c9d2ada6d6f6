"""Laws of plans of tensor parallelism: they name what there is, share nearly all of it, and say what they can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.shared_weights import FLUX, WAN_14B
from safelight.errors import CheckpointError
from services.denoiser.models import flux_dit, wan_dit
from services.denoiser.models.flux_dit import FluxDiT
from services.denoiser.models.wan_dit import WanDiT
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.parallel.tensor_parallel import ByInputs, TensorPlan, share_layers

WAN_FROM_PICTURES = replace(WAN_14B, in_channels=36, image_width=1280)
NETWORKS: dict[str, tuple[TensorPlan, Callable[[ParallelMesh], nn.Module]]] = {
    "flux": (flux_dit.TENSOR_PLAN, lambda mesh: FluxDiT(FLUX, mesh)),
    "wan": (wan_dit.TENSOR_PLAN, lambda mesh: WanDiT(WAN_FROM_PICTURES, mesh)),
}


@pytest.fixture(autouse=True)
def _without_memory() -> Iterator[None]:
    with torch.device("meta"):
        yield


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_names_nothing_that_is_not_there(name: str) -> None:
    plan, make = NETWORKS[name]
    network = make(ParallelMesh())
    names = {*dict(network.named_modules()), *dict(network.named_parameters())}
    assert {each for each in plan if each.replace("{}", "0") not in names} == set()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rank_of_a_real_transformer_has_nearly_its_share(name: str, ranks: int) -> None:
    _, make = NETWORKS[name]
    whole, shared = make(ParallelMesh()), make(ParallelMesh(tensor=Axis(0, ranks)))
    assert _size(whole) / ranks < _size(shared) < _size(whole) / ranks + 0.03 * _size(whole)


def test_a_width_that_ranks_can_t_share_is_named() -> None:
    network = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(CheckpointError, match=r"0\.weight has 6 columns, which 4 ranks can't share"):
        share_layers(network, {"0": ByInputs()}, 4, Axis(0, 4))
