"""One denoise step of Stable Diffusion 1.5's UNet (batch 2: a prompt and its negative): ours against diffusers'.

Both have the same random weights and inputs and take turns in one process, so that what else the machine does meets
both alike. The errors are against diffusers in float32 with the same, already rounded, weights.

    OMP_WAIT_POLICY=PASSIVE python -m bench.unet_step --dtype bfloat16 --rounds 5
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from services.denoiser.models.sd_unet import SDUNet, load_sd_unet
from services.modeling.weights import open_checkpoint

TOKENS = 77
TIMESTEPS = (981.0, 981.0)
# Fresh weights give attention logits with a deviation of 0.3; trained ones are several times that.
LOGIT_GAIN = 8.0

REAL = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = REAL | {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32}

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Seconds of a step, and errors max|a - b| / max|b| against float32."""

    torch: str
    dtype: str
    size: int
    threads: int
    rounds: int
    theirs_seconds: list[float]
    ours_seconds: list[float]
    theirs_median: float
    ours_median: float
    median_of_ratios: float
    ratios_from_to: tuple[float, float]
    context_seconds: float
    theirs_error: float
    ours_error: float
    difference: float


def main() -> None:
    """Runs the comparison and prints it."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        result = compare(options)
    sys.stdout.write(report(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one that isn't timed")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a UNet of 32 to 64 channels, to try the script out")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> Result:
    """Builds both networks, measures their errors and times them in turns."""
    dtype = getattr(torch, options.dtype)
    theirs, ours, exact, inputs = prepare(TINY if options.tiny else REAL, options.size, dtype)
    latents, timesteps, context = inputs
    context_kv, context_seconds = timed(lambda: ours.project_context(context))
    steps: list[Callable[[], Tensor]] = [
        lambda: theirs(latents, timesteps, context).sample,
        lambda: ours(latents, timesteps, context_kv),
    ]
    outputs = [step().float() for step in steps]
    theirs_seconds, ours_seconds = time_in_turns(steps, options.rounds)
    ratios = [our / their for our, their in zip(ours_seconds, theirs_seconds, strict=True)]
    return Result(
        torch=torch.__version__,
        dtype=options.dtype,
        size=options.size,
        threads=options.threads,
        rounds=options.rounds,
        theirs_seconds=theirs_seconds,
        ours_seconds=ours_seconds,
        theirs_median=statistics.median(theirs_seconds),
        ours_median=statistics.median(ours_seconds),
        median_of_ratios=statistics.median(ratios),
        ratios_from_to=(min(ratios), max(ratios)),
        context_seconds=context_seconds,
        theirs_error=relative_error(outputs[0], exact),
        ours_error=relative_error(outputs[1], exact),
        difference=relative_error(outputs[1], outputs[0]),
    )


def prepare(
    config: dict[str, Any], size: int, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, SDUNet, Tensor, Inputs]:
    """diffusers' UNet, ours, the output in float32, and the inputs in `dtype`."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("attn1.to_q.weight"):
            parameter.mul_(LOGIT_GAIN)
    theirs = theirs.to(dtype)
    inputs = (
        torch.randn(2, 4, size // 8, size // 8).to(dtype),
        torch.tensor(TIMESTEPS),
        torch.randn(2, TOKENS, config["cross_attention_dim"]).to(dtype),
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_sd_unet(open_checkpoint(Path(folder)), theirs.config, device=torch.device("cpu"), dtype=dtype)
    latents, timesteps, context = inputs
    exact = theirs.float()(latents.float(), timesteps, context.float()).sample
    return theirs.to(dtype), ours, exact, inputs


def time_in_turns(steps: list[Callable[[], Tensor]], rounds: int) -> list[list[float]]:
    """Seconds of each step in each round; who goes first alternates."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds):
        order = list(range(len(steps)))
        for index in order if turn % 2 == 0 else reversed(order):
            seconds[index].append(timed(steps[index])[1])
    return seconds


def timed(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call returns, and its wall time in seconds."""
    start = time.perf_counter()
    output = step()
    return output, time.perf_counter() - start


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((actual - expected).abs().max() / expected.abs().max())


def report(result: Result) -> str:
    """The result as a small table."""
    low, high = result.ratios_from_to
    lines = [
        f"SD 1.5 UNet step, {result.size} x {result.size}, batch 2, {result.dtype}, {result.threads} threads, "
        f"torch {result.torch}, {result.rounds} rounds",
        f"{'':12}{'median s':>10}{'min':>8}{'max':>8}{'error':>11}",
    ]
    for name, seconds, error in (
        ("diffusers", result.theirs_seconds, result.theirs_error),
        ("safelight", result.ours_seconds, result.ours_error),
    ):
        median = statistics.median(seconds)
        lines.append(f"{name:12}{median:10.2f}{min(seconds):8.2f}{max(seconds):8.2f}{error:11.1e}")
    lines.append(f"ratio of the pairs: median {result.median_of_ratios:.3f} ({low:.3f} to {high:.3f})")
    lines.append(f"difference {result.difference:.1e}; the text's keys and values, once a request: ")
    lines[-1] += f"{result.context_seconds:.3f} s"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
