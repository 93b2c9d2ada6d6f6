"""Trains the autoencoder of the demo model: 128x128 RGB <-> 16x16x4 latents (factor 8, as Stable Diffusion's).

A killed run resumes from its last checkpoint.

    python -m examples.demo_model.train_vae --minutes 22 --threads 2 --out /tmp/demo/vae
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from examples.demo_model.glyphs import load_glyphs, to_tensor
from examples.demo_model.training import (
    Clock,
    learning_rate_factor,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
)


@dataclass(frozen=True)
class VaeRecipe:
    """What the autoencoder is and how it is trained.

    Most of the time goes to 64x64 crops: a step on them costs a quarter, and colours, which come late, need many steps.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    norm_groups: int = 2
    crop: int = 64
    crop_batch: int = 8
    crop_share: float = 0.7
    full_batch: int = 4
    learning_rate: float = 2e-3
    warm_up: float = 0.02
    coarse_kernels: tuple[int, ...] = (4, 16)
    kl_weight: float = 1e-5
    clip_norm: float = 1.0


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """Builds the untrained autoencoder; most of its weights sit at low resolution, where a CPU is fast."""
    levels = len(recipe.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=recipe.norm_groups,
        sample_size=128,
    )


@torch.no_grad()
def initialise(vae: AutoencoderKL) -> None:
    """Starts the autoencoder as a linear map: residual branches at zero, the convolutions between them at unit gain.

    Normalised residual branches carry shapes but lose how saturated a colour is; from PyTorch's own initialisation they
    drown the skip path and colours are learnt only after thousands of steps.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.endswith(("conv1", "conv_out")):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        if name.endswith(("conv2", "to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def picture_loss(output: torch.Tensor, target: torch.Tensor, recipe: VaeRecipe) -> torch.Tensor:
    """Absolute and squared error of the pixels, plus the absolute error of two coarser scales (the colours)."""
    error = output.float() - target
    coarse = torch.stack([F.avg_pool2d(error, kernel).abs().mean() for kernel in recipe.coarse_kernels])
    return error.abs().mean() + error.square().mean() + coarse.sum()


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor, recipe: VaeRecipe) -> torch.Tensor:
    """Reconstruction through a sampled latent, plus a light pull of the posterior towards the unit Gaussian."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        output = vae.decode(posterior.sample()).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return picture_loss(output, pictures, recipe) + recipe.kl_weight * kl


def random_crops(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """A random window of each picture."""
    top, left = (int(offset) for offset in torch.randint(0, pictures.shape[-1] - size + 1, (2,)))
    return pictures[:, :, top : top + size, left : left + size]


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 16) -> float:
    """Mean over the pictures of the PSNR, in dB, of encoding (mode) and decoding, after rounding to 8 bits."""
    values = []
    for chunk in pictures.split(batch):
        output = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output - chunk) * 127.5).round().square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
        values.append(10.0 * torch.log10(255.0**2 / error))
    return float(torch.cat(values).mean())


class PictureOrder:
    """Endless shuffled passes over `count` pictures, a batch at a time."""

    def __init__(self, count: int, batch: int) -> None:
        self._count, self._batch = count, batch
        self._order = torch.randperm(count)

    def next_batch(self) -> torch.Tensor:
        if len(self._order) < self._batch:
            self._order = torch.randperm(self._count)
        chosen, self._order = self._order[: self._batch], self._order[self._batch :]
        return chosen


def train(vae: AutoencoderKL, pictures: torch.Tensor, recipe: VaeRecipe, minutes: float, checkpoint: Path) -> None:
    """Trains on crops, then on whole pictures, until the minutes are over."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    clock = Clock(budget=60.0 * minutes)
    crop_order = PictureOrder(len(pictures), recipe.crop_batch)
    full_order = PictureOrder(len(pictures), recipe.full_batch)
    states = load_checkpoint(checkpoint, clock)
    if states is not None:
        vae.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
    while clock.done < 1.0:
        set_learning_rate(optimizer, recipe.learning_rate * learning_rate_factor(clock.done, recipe.warm_up))
        if clock.done < recipe.crop_share:
            batch = random_crops(pictures[crop_order.next_batch()], recipe.crop)
        else:
            batch = pictures[full_order.next_batch()]
        loss = vae_loss(vae, batch.contiguous(memory_format=torch.channels_last), recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip_norm)
        optimizer.step()
        clock.tick(float(loss.detach()))
        clock.report(every=50)
        if clock.checkpoint_due():
            save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})
            print(f"PSNR of some pictures {measure_psnr(vae, pictures[::40]):.2f} dB", flush=True)
    save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = VaeRecipe()
    pictures = to_tensor(load_glyphs())
    vae = build_vae(recipe).to(memory_format=torch.channels_last)
    initialise(vae)
    print(f"{len(pictures)} pictures, {sum(p.numel() for p in vae.parameters())} parameters", flush=True)
    train(vae, pictures, recipe, arguments.minutes, arguments.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
