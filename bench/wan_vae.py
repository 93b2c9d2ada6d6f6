"""A film of 17 frames through Wan2.1's VAE at its real width: ours against diffusers'.

256x256 pixels, decoded from 5 latent frames or encoded to them. Both have the same random weights and inputs and take
turns in one process (bench/in_turns.py). The errors are against diffusers in float32 with the same, already rounded,
weights. Peak memory is the kernel's of the resident set (VmHWM), of a process of its own for each that does it once,
less what it had before.

    OMP_WAIT_POLICY=PASSIVE python -m bench.wan_vae --dtype bfloat16 --rounds 3
    OMP_WAIT_POLICY=PASSIVE python -m bench.wan_vae --dtype bfloat16 --encode
    python -m bench.wan_vae --dtype bfloat16 --peaks
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from bench.in_turns import Step, ratios, relative_error, summary, time_in_turns
from bench.load_memory import memory_status
from services.common.allocator import keep_freed_memory
from services.decoder.models.wan import WanDecoder
from services.decoder.models.wan_vae import film_pieces, load_wan_vae
from services.decoder.tiling import DEFAULT_TILING
from services.modeling.components import resolve_dtype
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint

TINY: dict[str, Any] = {"base_dim": 8}
FRAMES, SIDE, TINY_SIDE = 17, 256, 64
WHO = ("diffusers", "ours")


def main() -> None:
    """Runs the comparison and prints it."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every server does
    with torch.inference_mode():
        if options.peak_of:
            sys.stdout.write(f"{options.peak_of:10} peak {peak_bytes(options) / 2**20:.0f} MiB\n")
        elif options.peaks:
            sys.stdout.write("".join(in_child([*sys.argv[1:], "--peak-of", name]) for name in WHO))
        else:
            sys.stdout.write(compare(options))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--encode", action="store_true", help="encode the film instead of decoding it")
    parser.add_argument("--rounds", type=int, default=3, help="timed films of each, after one that isn't timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="8 channels and 64x64 pixels, to try the script out")
    parser.add_argument("--peaks", action="store_true", help="measure peak memory, and no time")
    parser.add_argument("--peak-of", choices=WHO, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace) -> str:
    """Builds both networks, measures their errors, times them in turns; returns the report."""
    steps = build_steps(options)
    exact = their_step(their_vae(options).float(), film_or_latents(options), options)
    errors = [relative_error(step().float(), exact) for step in steps]
    timings = time_in_turns(steps, options.rounds)
    what = "encode" if options.encode else "decode"
    lines = [f"torch {torch.__version__}, {what}, {options.dtype}, {options.threads} threads\n"]
    for name, timing, error in zip(WHO, timings, errors, strict=True):
        lines.append(f"{name:10} wall s{summary(timing.wall)}  CPU s{summary(timing.cpu)}  error {error:.1e}\n")
    walls, cpus = (summary(ratios(timings[1], timings[0], clock)) for clock in ("wall", "cpu"))
    lines.append(f"{'ratio':10} wall  {walls}  CPU  {cpus}\n")
    return "".join(lines)


def in_child(arguments: list[str]) -> str:
    """What this script prints with these arguments."""
    command = [sys.executable, "-m", "bench.wan_vae", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak_bytes(options: argparse.Namespace) -> int:
    """Peak of doing it once in this process, above what it had with the weights loaded."""
    step = build_steps(options)[WHO.index(options.peak_of)]
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    resident = memory_status("VmRSS")
    step()
    return memory_status("VmHWM") - resident


def build_steps(options: argparse.Namespace) -> tuple[Step, Step]:
    """A film by diffusers, and by ours with the same weights."""
    theirs, x = their_vae(options), film_or_latents(options)
    ours = same_in_ours(theirs, resolve_dtype(options.dtype, torch.device("cpu")))

    def our_step() -> Tensor:
        if options.encode:
            return torch.cat(list(ours.encode_film(film_pieces(x[0].movedim(1, 0)), DEFAULT_TILING)), dim=2)
        return torch.cat(list(ours.decode_film(x, DEFAULT_TILING))).clamp(-1, 1).movedim(0, 1)[None]

    return lambda: their_step(theirs, x.to(theirs.dtype), options), our_step


def their_vae(options: argparse.Namespace) -> AutoencoderKLWan:
    """diffusers' VAE of random weights, the same at each call; of no mean and deviation of the latents."""
    torch.manual_seed(0)
    scale = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    return AutoencoderKLWan(**scale, **(TINY if options.tiny else {})).eval().to(getattr(torch, options.dtype))


def film_or_latents(options: argparse.Namespace) -> Tensor:
    """[1, 3, 17, H, W] to encode, or [1, 16, 5, h, w] to decode."""
    side = TINY_SIDE if options.tiny else SIDE
    generator = torch.Generator().manual_seed(0)
    if options.encode:
        return torch.rand(1, 3, FRAMES, side, side, generator=generator) * 2 - 1
    return torch.randn(1, 16, 1 + (FRAMES - 1) // 4, side // 8, side // 8, generator=generator)


def same_in_ours(theirs: AutoencoderKLWan, dtype: torch.dtype) -> WanDecoder:
    """Our network with their weights, placed as a decoder places it."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        vae = load_wan_vae(open_checkpoint(Path(folder)), dict(theirs.config), device=cpu, dtype=dtype)
        return WanDecoder(place(vae, Placement(device=cpu, dtype=dtype), vae.weight_blocks()), fingerprint="")


def their_step(theirs: AutoencoderKLWan, x: Tensor, options: argparse.Namespace) -> Tensor:
    """diffusers' frames in [-1, 1], or the mean of its latents."""
    result: Tensor = theirs.encode(x).latent_dist.mode() if options.encode else theirs.decode(x).sample
    return result


if __name__ == "__main__":
    main()
