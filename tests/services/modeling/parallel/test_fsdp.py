"""Laws of weights that are gathered for each block's turn: the bits of whole ones, and a bounded peak."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import CheckpointError
from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.parallel.sharing import share
from services.modeling.placement import Placement, place
from services.modeling.residency import Residency
from services.modeling.weight_streaming import WeightBlock
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
    """Of a rank."""

    outputs: list[Tensor]
    peak_bytes: int
    kept: Tensor


def _inputs() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def _compute(mesh: ParallelMesh, file: Path, float8: bool) -> Outcome:
    with torch.device("meta"):
        network = Network()
        shares = share(network, mesh, {}, heads=1)
    sources = {name: (name,) for name in network.state_dict()}
    load_weights(network, open_checkpoint(file), sources, device=CPU, dtype=torch.float32, shares=shares)
    placement = Placement(device=CPU, dtype=torch.float32, float8=float8)
    placed = place(network, placement, network.blocks(), shares=shares)
    outputs = [network(_inputs()) for _ in range(3)]
    kept = next(network.layers[0].parameters()).detach()
    return Outcome(outputs, placed.weights.account.peak_bytes, kept.clone())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fsdp") / "network.safetensors"
    save_file(Network().state_dict(), path)
    return path


@pytest.mark.parametrize("float8", [False, True])
def test_gathered_weights_compute_the_bits_of_whole_ones(file: Path, float8: bool) -> None:
    alone = _compute(ParallelMesh(), file, float8)
    for rank in on_ranks(ParallelDegrees(cfg=2, fsdp=True), _compute, file, float8):
        assert all(map(torch.equal, rank.outputs, alone.outputs))
        matrix = WIDTH * WIDTH * (1 if float8 else 4)
        assert rank.kept.nbytes <= matrix / 2 + 256
        vector = WIDTH * 4
        layer = matrix + 2 * vector
        ends = layer + 6 * vector
        # Half of everything but biases, and two blocks of the larger kind.
        assert rank.peak_bytes <= (DEPTH * layer + ends) / 2 + (DEPTH + 1) * vector + 2 * ends


def test_weights_that_are_gathered_are_not_offloaded(file: Path) -> None:
    mesh = ParallelMesh(all_ranks=Axis(0, 2), fsdp=True)
    with torch.device("meta"):
        network = Network()
        shares = share(network, mesh, {}, heads=1)
    placement = Placement(device=torch.device("cuda"), dtype=torch.float32, residency=Residency(budget_bytes=0))
    with pytest.raises(CheckpointError, match=r"'fsdp'.*can't be offloaded"):
        place(network, placement, network.blocks(), shares=shares)
