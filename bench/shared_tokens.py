"""One step of Wan's blocks on two ranks that share the tokens, against the same on one.

Two of the 1.3B model's blocks at their real width, random weights, a film of 2,025 tokens. Two processes, over gloo on
the loopback, take turns at: one of them alone, alone with two threads, both with Ulysses, both with a ring.

    OMP_WAIT_POLICY=PASSIVE python -m bench.shared_tokens --dtype float32 --rounds 5
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import distributed, nn

from bench.in_turns import summary
from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.models.wan_dit import WanDiT
from services.denoiser.models.wan_dit_params import WanDiTParams
from services.modeling.components import resolve_dtype
from services.modeling.layers import pack_weights
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh, mesh_of
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
HEAD_WIDTH, TEXT_TOKENS, TEXT_WIDTH = 128, 512, 4096
REAL_SIZE, TINY_SIZE = (5, 54, 30), (2, 8, 8)  # frames, height and width of the latent
CASES = ("alone, 1 thread", "alone, 2 threads", "ulysses 2", "ring 2")


def main() -> None:
    """Runs the comparison and prints it."""
    options = parse_options()
    seconds, _ = on_ranks(ParallelDegrees(ulysses=2), measure, options)
    sys.stdout.write(f"torch {torch.__version__}, {options.dtype}\n")
    for case in CASES:
        ratios = [ours / alone for ours, alone in zip(seconds[case], seconds[CASES[0]], strict=True)]
        sys.stdout.write(f"{case:18} wall s{summary(seconds[case])}  ratio{summary(ratios)}\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one that isn't timed")
    parser.add_argument("--tiny", action="store_true", help="a block of 256 channels, to try the script out")
    return parser.parse_args()


@torch.inference_mode()
def measure(ulysses: ParallelMesh, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each case's steps on this rank."""
    meshes = (ONE_RANK_MESH, ONE_RANK_MESH, ulysses, mesh_of(ParallelDegrees(ring=2), CPU))
    dtype = resolve_dtype(options.dtype, CPU)
    dit, size = network(options.tiny, dtype), TINY_SIZE if options.tiny else REAL_SIZE
    latents = torch.randn(1, dit.params.in_channels, *size, dtype=dtype)
    context = dit.prepare(torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, dtype=dtype), None, None, size)
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for turn in range(options.rounds + 1):
        for case, mesh in zip(CASES, meshes, strict=True):
            dit.mesh = mesh
            torch.set_num_threads(2 if case == "alone, 2 threads" else 1)
            distributed.barrier()
            started = time.perf_counter()
            if mesh is not ONE_RANK_MESH or ulysses.ulysses.rank == 0:
                dit(latents, torch.tensor([500.0]), context)
            if turn > 0:
                seconds[case].append(time.perf_counter() - started)
    return seconds


def network(tiny: bool, dtype: torch.dtype) -> WanDiT:
    """With the same random weights on both ranks, packed as a denoiser packs them."""
    heads = 2 if tiny else 12
    params = WanDiTParams(
        in_channels=16,
        out_channels=16,
        width=heads * HEAD_WIDTH,
        heads=heads,
        mlp_width=512 if tiny else 8960,
        blocks=2,
        text_width=TEXT_WIDTH,
        image_width=None,
        image_positions=None,
    )
    torch.manual_seed(0)
    dit = WanDiT(params).to(dtype)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.02)
    pack_weights(dit.requires_grad_(False))
    return dit


if __name__ == "__main__":
    main()
