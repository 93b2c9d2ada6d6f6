"""Decoding one picture with our AutoencoderKL and with diffusers', in one process, in turns.

    OMP_WAIT_POLICY=PASSIVE python bench/vae_decode.py --dtype bfloat16 --rounds 3
    python bench/vae_decode.py --tiny

Both have the same random weights of Stable Diffusion's sizes. Wall and CPU time are medians over the rounds, after a
small decode each; memory is the peak of the resident set (of the allocator, on CUDA) during a decode, less what was in
use before.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL as DiffusersVAE
from torch import Tensor

from services.decoder.models.autoencoder_kl import AutoencoderKL, LatentScale, params_from_config
from services.decoder.models.autoencoder_kl_keys import DIFFUSERS

WIDTHS, TINY_WIDTHS = (128, 256, 512, 512), (32, 32, 64, 64)


@dataclass
class Contender:
    """A way to decode, and what its runs took."""

    name: str
    decode: Callable[[Tensor], Tensor]
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)


def vae_config(widths: tuple[int, ...]) -> dict[str, object]:
    """A diffusers config like that of Stable Diffusion 1.5, with these widths."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }


def build_contenders(widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Ours, diffusers' as it is, and diffusers' in channels_last, all with the same weights."""
    config = vae_config(widths)
    torch.manual_seed(0)
    theirs = DiffusersVAE(**config).eval().to(device, dtype)
    weights = theirs.state_dict()
    ours = AutoencoderKL(params_from_config(config, LatentScale(factor=1.0))).eval().to(device, dtype)
    names = {name: DIFFUSERS.sources(name, len(widths)) for name in ours.state_dict()}
    ours.load_state_dict({name: torch.cat([weights[source] for source in names[name]]) for name in names})
    for parameter in ours.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    channels_last = DiffusersVAE(**config).eval().to(device, dtype)
    channels_last.load_state_dict(weights)
    channels_last.to(memory_format=torch.channels_last)
    return [
        Contender("ours", ours.decode),
        Contender("diffusers", lambda z: theirs.decode(z).sample),
        Contender("diffusers, channels_last", lambda z: channels_last.decode(_channels_last(z)).sample),
    ]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def run_once(contender: Contender, latents: Tensor) -> Tensor:
    """One decode, measured."""
    before = _reset_peak_mib(latents.device)
    wall, cpu = time.perf_counter(), time.process_time()
    image = contender.decode(latents)
    if image.is_cuda:
        torch.cuda.synchronize()
    contender.wall_seconds.append(time.perf_counter() - wall)
    contender.cpu_seconds.append(time.process_time() - cpu)
    contender.peak_mib.append(_peak_mib(latents.device) - before)
    return image


def _reset_peak_mib(device: torch.device) -> float:
    """Starts a new peak; returns the memory in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    return _peak_mib(device)


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def report(contenders: list[Contender], title: str) -> str:
    """A Markdown table of medians, with ratios to ours."""
    ours = contenders[0]
    lines = [title, "", "| VAE | wall s | CPU s | peak MiB | wall / ours | CPU / ours |", "| --- " * 6 + "|"]
    for each in contenders:
        wall_ratio = statistics.median(each.wall_seconds) / statistics.median(ours.wall_seconds)
        cpu_ratio = statistics.median(each.cpu_seconds) / statistics.median(ours.cpu_seconds)
        cells = (
            each.name,
            median_and_all(each.wall_seconds),
            median_and_all(each.cpu_seconds),
            f"{statistics.median(each.peak_mib):.0f}",
            f"{wall_ratio:.2f}",
            f"{cpu_ratio:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def median_and_all(seconds: list[float]) -> str:
    """The median, and each run in brackets: a reader sees whether the machine was quiet."""
    return f"{statistics.median(seconds):.2f} ({' '.join(f'{each:.2f}' for each in seconds)})"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="narrow widths and 128 pixels: seconds instead of minutes")
    return parser.parse_args()


def main() -> None:
    """Runs the contenders in turns and writes a table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    side, widths = (128, TINY_WIDTHS) if arguments.tiny else (arguments.side, WIDTHS)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    contenders = build_contenders(widths, arguments.device, dtype)
    latents = torch.randn(1, 4, side // 8, side // 8).to(arguments.device, dtype)
    with torch.inference_mode():
        for contender in contenders:
            contender.decode(latents[..., :8, :8])
    for _ in range(arguments.rounds):
        for contender in contenders:
            run_once(contender, latents)
    title = (
        f"{side}x{side}, {arguments.dtype}, {arguments.device}, {arguments.threads} threads, torch {torch.__version__}"
    )
    sys.stdout.write(report(contenders, title))


if __name__ == "__main__":
    main()
