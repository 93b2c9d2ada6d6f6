"""Memory of one rank of a group that shares a transformer's weights: while it loads, and from then on.

Two double and four single blocks of FLUX.1 at their real width, in a file in bfloat16, are loaded by a process of its
own for each case, as the first rank of a group that need not be there for that. "peak" is the kernel's of the resident
set (VmHWM), less what the process had before; "keeps" are the bytes of weights on the device, and "computes" those with
the blocks that are gathered meanwhile. The second table has from shapes alone what a rank holds of whole transformers.

    OMP_WAIT_POLICY=PASSIVE python -m bench.shared_weights
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.load_memory import memory_status
from services.denoiser.models.flux_dit import FluxDiT, load_flux_dit
from services.denoiser.models.flux_dit_keys import DIFFUSERS
from services.denoiser.models.flux_dit_params import FluxDiTParams
from services.denoiser.models.wan_dit import WanDiT
from services.denoiser.models.wan_dit_params import WanDiTParams
from services.modeling.parallel.mesh import Axis, ParallelMesh
from services.modeling.placement import Placement, place
from services.modeling.residency import SLOTS
from services.modeling.weight_streaming import OffloadedWeights
from services.modeling.weights import Piece, open_checkpoint

_GIB = 2**30
_CPU, _DTYPE = torch.device("cpu"), torch.bfloat16
FLUX = FluxDiTParams(
    in_channels=64,
    width=3072,
    heads=24,
    double_blocks=19,
    single_blocks=38,
    context_width=4096,
    pooled_width=768,
    distilled_guidance=True,
    rope_channels=(16, 56, 56),
)
WAN_14B = WanDiTParams(
    in_channels=16,
    out_channels=16,
    width=5120,
    heads=40,
    mlp_width=13824,
    blocks=40,
    text_width=4096,
    image_width=None,
    image_positions=None,
)
RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Case:
    """A way to share, and by how many ranks."""

    way: str
    ranks: int

    def mesh(self) -> ParallelMesh:
        """The place of the first rank."""
        axis = Axis(0, self.ranks)
        return ParallelMesh(tensor=axis) if self.way == "tensor" else ParallelMesh(all_ranks=axis, fsdp=True)


CASES = (Case("tensor", 1), *(Case(way, ranks) for way in ("tensor", "fsdp") for ranks in RANKS))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    peak: int
    keeps: int
    computes: int


def main() -> None:
    """Measures every case in a process of its own, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a narrow transformer, to try the script out")
    parser.add_argument("--load", nargs=2, metavar=("FILE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        file, case = options.load
        sys.stdout.write(json.dumps(asdict(measure(Path(file), Case(**json.loads(case))))))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = save(Path(folder) / "flux.safetensors", tiny=options.tiny)
        sys.stdout.write(f"{'GiB':16}{'peak':>8}{'keeps':>8}{'computes':>9}\n")
        for case in CASES[:: 3 if options.tiny else 1]:
            memory = in_child(file, case)
            sys.stdout.write(f"{case.way:>6} {case.ranks:<9}{_gib(memory.peak, memory.keeps, memory.computes)}\n")
    sys.stdout.write(f"\n{'GiB':16}{'FLUX.1':>8}{'Wan 14B':>8}\n")
    for case in CASES:
        sys.stdout.write(f"{case.way:>6} {case.ranks:<9}{_gib(*(held(name, case) for name in ('flux', 'wan')))}\n")


def save(file: Path, *, tiny: bool) -> Path:
    """Writes a transformer of zeros in diffusers' layout."""
    params = replace(FLUX, double_blocks=2, single_blocks=4)
    with torch.device("meta"):
        dit = FluxDiT(replace(params, width=256, heads=8, rope_channels=(4, 14, 14)) if tiny else params)
    tensors = {}
    for name, sources in DIFFUSERS.sources(dit.state_dict().keys()).items():
        rows, *rest = dit.get_parameter(name).shape
        for source in sources:
            whole = rows if isinstance(source, Piece) else rows // len(sources)
            tensors[source.name if isinstance(source, Piece) else source] = torch.zeros(whole, *rest, dtype=_DTYPE)
    save_file(tensors, file)
    return file


def in_child(file: Path, case: Case) -> Memory:
    """What a process measures that does nothing else."""
    command = [sys.executable, "-m", "bench.shared_weights", "--load", str(file), json.dumps(asdict(case))]
    return Memory(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def measure(file: Path, case: Case) -> Memory:
    """Loads in this process."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch's libraries take for themselves
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    resident = memory_status("VmRSS")
    dit = load_flux_dit(open_checkpoint(file), None, device=_CPU, dtype=_DTYPE, mesh=case.mesh())
    placed = place(dit, Placement(device=_CPU, dtype=_DTYPE), dit.weight_blocks(), shares=dit.shares)
    peak, keeps = memory_status("VmHWM") - resident, placed.weights.account.resident_bytes
    gathered = placed.weights.plan.peak_bytes if isinstance(placed.weights, OffloadedWeights) else 0
    return Memory(peak, keeps, keeps + gathered)


def held(family: str, case: Case) -> int:
    """Bytes of weights on a rank's device while it computes."""
    with torch.device("meta"):
        whole, dit = (
            FluxDiT(FLUX, mesh) if family == "flux" else WanDiT(WAN_14B, mesh) for mesh in (ParallelMesh(), case.mesh())
        )
    largest = max(
        sum(parameter.numel() for module in block.modules for parameter in module.parameters())
        for block in whole.weight_blocks()
    )
    kept = sum(parameter.numel() for parameter in dit.parameters())
    return (kept + SLOTS * largest * (case.way == "fsdp")) * _DTYPE.itemsize


def _gib(*sizes: int) -> str:
    return "".join(f"{size / _GIB:8.2f}" for size in sizes)


if __name__ == "__main__":
    main()
