"""One step of a stack of Wan's blocks at their real width: ours against diffusers'.

1536 channels, 12 heads, four blocks (of the 1.3B model's 30), 2,025 tokens of a film of five latent frames and 512 of
text. Both have the same random weights and inputs and take turns in one process (bench/in_turns.py). The text's keys
and values are made once a request, so they are not in our step. The errors are against diffusers in float32 with the
same, already rounded, weights.

    OMP_WAIT_POLICY=PASSIVE python -m bench.wan_step --dtype bfloat16 --rounds 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from bench.in_turns import Step, ratios, relative_error, summary, time_in_turns
from services.denoiser.models.wan_dit import WanDiT, load_wan_dit
from services.modeling.components import resolve_dtype
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint

REAL: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 4,
    "text_dim": 4096,
}
TINY: dict[str, Any] = REAL | {"num_attention_heads": 1, "ffn_dim": 128, "num_layers": 1, "text_dim": 64}
REAL_SIZE, TINY_SIZE = (5, 54, 30), (2, 8, 8)  # frames, height and width of the latent
TEXT_TOKENS, TIMESTEP = 512, 500.0


def main() -> None:
    """Runs the comparison and prints it."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        sys.stdout.write(compare(options))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one that isn't timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a stack of 128 channels, to try the script out")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> str:
    """Builds both networks, measures their errors and times them in turns; returns the report."""
    dtype, ours_dtype = getattr(torch, options.dtype), resolve_dtype(options.dtype, torch.device("cpu"))
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**(TINY if options.tiny else REAL)).eval().to(dtype)
    size = TINY_SIZE if options.tiny else REAL_SIZE
    latents = torch.randn(1, theirs.config.in_channels, *size).to(dtype)
    embeds, timesteps = torch.randn(1, TEXT_TOKENS, theirs.config.text_dim).to(dtype), torch.tensor([TIMESTEP])
    ours = same_in_ours(theirs, ours_dtype)
    context = ours.prepare(embeds.to(ours_dtype), None, None, size)
    exact = their_step(theirs.float(), latents.float(), timesteps, embeds.float())
    theirs = theirs.to(dtype)
    steps: tuple[Step, Step] = (
        lambda: their_step(theirs, latents, timesteps, embeds),
        lambda: ours(latents.to(ours_dtype), timesteps, context),
    )
    errors = [relative_error(step().float(), exact) for step in steps]
    timings = time_in_turns(steps, options.rounds)
    lines = [f"torch {torch.__version__}, {options.dtype} (ours {ours_dtype}), {options.threads} threads\n"]
    for name, timing, error in zip(("diffusers", "ours"), timings, errors, strict=True):
        lines.append(f"{name:10} wall s{summary(timing.wall)}  CPU s{summary(timing.cpu)}  error {error:.1e}\n")
    walls, cpus = (summary(ratios(timings[1], timings[0], clock)) for clock in ("wall", "cpu"))
    lines.append(f"{'ratio':10} wall  {walls}  CPU  {cpus}\n")
    return "".join(lines)


def same_in_ours(theirs: WanTransformer3DModel, dtype: torch.dtype) -> WanDiT:
    """Our network with their weights, placed as a denoiser places it."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        dit = load_wan_dit(open_checkpoint(Path(folder)), dict(theirs.config), device=cpu, dtype=dtype)
        return place(dit, Placement(device=cpu, dtype=dtype), dit.weight_blocks()).network


def their_step(theirs: WanTransformer3DModel, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
    """diffusers' velocity."""
    velocity: Tensor = theirs(latents, timesteps, embeds, return_dict=False)[0]
    return velocity


if __name__ == "__main__":
    main()
