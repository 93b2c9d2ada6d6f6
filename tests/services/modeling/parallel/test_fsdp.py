"""Laws of weights that are gathered for each block's turn: the bits of whole ones, and a bounded peak."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import CheckpointError
from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.fsdp import gathered_weights
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.parallel.shards import Shares
from services.modeling.parallel.sharing import share
from services.modeling.placement import PlacedWeights, Placement, place
from services.modeling.residency import Residency
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weight_transfer import SynchronousTransfer
from services.modeling.weights import load_weights, open_checkpoint
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
WIDTH, DEPTH = 128, 6


class Network(nn.Module):
    """Layers between two ends, one of which has rows that two ranks can't share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        out: Tensor = self.last(x)
        return out

    def blocks(self) -> list[WeightBlock]:
        """Its layers, and both ends."""
        layers = [WeightBlock(f"layers.{index}", (layer,)) for index, layer in enumerate(self.layers)]
        return [WeightBlock("ends", (self.first, self.last)), *layers]


class Outcome(NamedTuple):
    """Of a rank: what it computed in three passes, the bytes of the largest matrix that it keeps, and what the device
    held: at most, and before, between and after the passes."""

    outputs: list[Tensor]
    matrix_bytes: int
    peak_bytes: int
    resident_bytes: list[int]


def _inputs() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def _load(mesh: ParallelMesh, file: Path) -> tuple[Network, Shares]:
    with torch.device("meta"):
        network = Network()
        shares = share(network, mesh, {}, heads=1)
    sources = {name: (name,) for name in network.state_dict()}
    load_weights(network, open_checkpoint(file), sources, device=CPU, dtype=torch.float32, shares=shares)
    return network, shares


def _placed(mesh: ParallelMesh, file: Path, *, float8: bool = False) -> Outcome:
    network, shares = _load(mesh, file)
    placement = Placement(device=CPU, dtype=torch.float32, float8=float8)
    return _computed(network, place(network, placement, network.blocks(), shares=shares).weights)


def _offloaded(mesh: ParallelMesh, file: Path) -> Outcome:
    network, shares = _load(mesh, file)
    transfer = SynchronousTransfer(CPU)
    return _computed(
        network, gathered_weights(network, shares.shards, mesh.all_ranks, network.blocks(), transfer, offloads=True)
    )


def _computed(network: Network, weights: PlacedWeights) -> Outcome:
    outputs, resident = [], [weights.account.resident_bytes]
    for _ in range(3):
        outputs.append(network(_inputs()))
        resident.append(weights.account.resident_bytes)
        weights.leave()
    resident.append(weights.account.resident_bytes)
    largest = max(parameter.nbytes for parameter in network.parameters())
    return Outcome(outputs, largest, weights.account.peak_bytes, resident)


WAYS: dict[str, Callable[[ParallelMesh, Path], Outcome]] = {
    "float32": _placed,
    "float8": partial(_placed, float8=True),
    "offloaded": _offloaded,
}


@torch.inference_mode()
def _all_ways(mesh: ParallelMesh, file: Path) -> dict[str, Outcome]:
    return {name: compute(mesh, file) for name, compute in WAYS.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fsdp") / "network.safetensors"
    save_file(Network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ranks(file: Path) -> list[dict[str, Outcome]]:
    return on_ranks(ParallelDegrees(cfg=2, fsdp=True), _all_ways, file)


@pytest.mark.parametrize("way", WAYS)
def test_gathered_weights_compute_the_bits_of_whole_ones(file: Path, ranks: list[dict[str, Outcome]], way: str) -> None:
    with torch.inference_mode():
        alone = _placed(ParallelMesh(), file, float8=way == "float8")
    assert all(torch.equal(output, alone.outputs[0]) for rank in ranks for output in rank[way].outputs)


@pytest.mark.parametrize(("way", "bytes_per_weight"), [("float32", 4), ("float8", 1), ("offloaded", 4)])
def test_the_device_holds_a_share_and_two_blocks(
    ranks: list[dict[str, Outcome]], way: str, bytes_per_weight: int
) -> None:
    matrix, vector = WIDTH * WIDTH * bytes_per_weight, WIDTH * 4
    layer = matrix + 2 * vector  # with its bias and scales
    ends = layer + 6 * vector
    share_bytes = 0 if way == "offloaded" else (DEPTH * layer + ends) / 2 + (DEPTH + 1) * vector
    for rank in ranks:
        assert rank[way].matrix_bytes <= matrix / 2
        assert 0.9 * (share_bytes + 2 * ends) < rank[way].peak_bytes <= share_bytes + 2 * ends


def test_nothing_is_left_on_the_device_of_what_is_offloaded(ranks: list[dict[str, Outcome]]) -> None:
    for rank in ranks:
        assert [size > 0 for size in rank["offloaded"].resident_bytes] == [False, True, True, True, False]


@pytest.mark.parametrize("leaves", [False, True])
def test_gathered_weights_have_no_budget(file: Path, leaves: bool) -> None:
    network, shares = _load(ParallelMesh(all_ranks=Axis(0, 2), fsdp=True), file)
    residency = Residency(budget_bytes=10**9, leaves_when_idle=leaves)
    placement = Placement(device=torch.device("cuda"), dtype=torch.float32, residency=residency)
    with pytest.raises(CheckpointError, match="no other 'memory_budget'"):
        place(network, placement, network.blocks(), shares=shares)
