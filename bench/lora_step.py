"""One denoise step of SD1.5's UNet (batch 2) with LoRAs, beside the layers or within them, against the plain step.

A LoRA has rank 16 on every linear layer of the transformers, as most have. "beside" is one for both rows, "two sets" a
different one for each, "within" a fused set. They take turns in one process; the figures are ratios to the plain step
of the same round. How long fusing takes is told, too: it must be made good by later steps.

    OMP_WAIT_POLICY=PASSIVE python -m bench.lora_step --rounds 5     # 8 GB of memory
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.in_turns import Timing, ratios, summary, timed
from bench.real_width import save_real_width_sd15
from services.common.manifest import ModelEntry
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.models.sd15 import load_sd15
from services.denoiser.registry import LocalDenoiser
from services.modeling.lora.adapter import Applied
from services.modeling.lora.fusing import FusedSet, fuse
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.reading import read_adapter

_RANK = 16
_OF_DIFFUSERS = ("down_blocks", "mid_block", "up_blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of a few weights, to see that it runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = _load_model(Path(folder), tiny=arguments.tiny)
        first, second = (
            (
                Applied(
                    read_adapter(str(seed), str(_save_lora(model, Path(folder), seed)), [model.network], [DENOISER]), 1
                ),
            )
            for seed in (1, 2)
        )
    started = time.perf_counter()
    with torch.inference_mode():
        fused = fuse(model.network.module, DENOISER, first)
    sys.stdout.write(f"fusing took {time.perf_counter() - started:.2f} s\n")
    _report(model, first, second, fused, arguments.size // 8, arguments.rounds)


def _load_model(folder: Path, *, tiny: bool) -> LocalDenoiser:
    if tiny:
        from tests.support.tiny_sd15 import save_tiny_sd15

        save_tiny_sd15(folder / "model")
    else:
        save_real_width_sd15(folder / "model", torch.float32)
    return load_sd15(ModelEntry(name="bench", path=str(folder / "model")), torch.device("cpu"))


def _save_lora(model: LocalDenoiser, folder: Path, seed: int) -> Path:
    """A LoRA of all linear layers within transformers, named as in diffusers."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, targets in model.network.targets.items():
        if name.startswith(_OF_DIFFUSERS) and "transformer_blocks" in name:
            rows, width = model.network.weight_shape(targets)
            tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(_RANK, width, generator=generator) / width**0.5
            tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, _RANK, generator=generator) * 0.01
    save_file(tensors, folder / f"{seed}.safetensors")
    return folder / f"{seed}.safetensors"


@torch.inference_mode()
def _report(
    model: LocalDenoiser,
    first: tuple[Applied, ...],
    second: tuple[Applied, ...],
    fused: FusedSet,
    side: int,
    rounds: int,
) -> None:
    network = model.network
    shape = (model.describe("").denoiser.latent_channels, side, side)
    prompt = PromptConditioning(model.example_conditioning(), "conditioning", shape)
    rows, latents = [model.prepare(prompt)] * 2, torch.randn(2, *shape)
    timings = {name: Timing() for name in ("plain", "beside", "two sets", "within")}

    def context(name: str) -> AbstractContextManager[None]:
        if name == "within":
            return fused.in_place(network.module)
        if name == "plain":
            return nullcontext()
        return network.with_branches([first, first if name == "beside" else second])

    for turn in range(rounds + 1):  # the first warms up
        for name, timing in timings.items():
            with context(name):
                timed(lambda: model.predict(latents, torch.tensor([981.0, 981.0]), rows), timing if turn else Timing())
    _write(timings)


def _write(timings: Mapping[str, Timing]) -> None:
    plain = timings["plain"]
    sys.stdout.write(f"plain step: wall {summary(plain.wall)} s, cpu {summary(plain.cpu)} s\n")
    for name, timing in timings.items():
        if name != "plain":
            wall, cpu = summary(ratios(timing, plain, "wall")), summary(ratios(timing, plain, "cpu"))
            sys.stdout.write(f"{name:>10} / plain: wall {wall}, cpu {cpu}\n")


if __name__ == "__main__":
    main()
