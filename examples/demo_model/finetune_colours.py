"""Teaches the autoencoder the axis of colour it has missed, green against magenta, and keeps its latents almost in place.

After its short training the autoencoder told light from dark and blue from orange, but drew a green apple brown. Here
encoder and decoder go on together: greens and purples are drawn more often and their error counts extra, while an anchor
holds the latents near the cached ones, so that the UNet, which is training on those, can change over.

    python finetune_colours.py --prepared /tmp/demo/prepared --decoder /tmp/demo/decoder --minutes 8 --out /tmp/demo/colours
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from glyphs import load_glyphs, to_tensor
from prepare import encode_all
from train_vae import VaeRecipe, measure_psnr, picture_loss
from training import Clock, learning_rate_factor, load_checkpoint, load_states, save_checkpoint, set_learning_rate


@dataclass(frozen=True)
class ColourRecipe:
    """How encoder and decoder are trained further."""

    batch: int = 4
    learning_rate: float = 1.5e-3
    warm_up: float = 0.05
    colour_weight: float = 2.0
    anchor_weight: float = 0.05
    latent_noise: float = 0.05
    clip_norm: float = 1.0


def green_magenta(pictures: torch.Tensor) -> torch.Tensor:
    """Green minus the mean of red and blue, over 4x4 blocks."""
    return F.avg_pool2d(pictures[:, 1:2] - (pictures[:, 0:1] + pictures[:, 2:3]) / 2, 4)


def colour_loss(vae: AutoencoderKL, pictures: torch.Tensor, anchor: torch.Tensor, recipe: ColourRecipe) -> torch.Tensor:
    """The picture loss, the error of the missing axis and the distance of the scaled latents from their anchor."""
    factor = vae.config.scaling_factor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mode() * factor
        output = vae.decode((latents + recipe.latent_noise * torch.randn_like(latents)) / factor).sample.float()
    colour = (green_magenta(output) - green_magenta(pictures)).abs().mean()
    drift = (latents.float() - anchor).square().mean()
    return picture_loss(output, pictures, VaeRecipe()) + recipe.colour_weight * colour + recipe.anchor_weight * drift


def finetune(vae: AutoencoderKL, latents: torch.Tensor, pictures: torch.Tensor, minutes: float, checkpoint: Path) -> None:
    """Trains until the minutes are over."""
    recipe, clock = ColourRecipe(), Clock(budget=60.0 * minutes)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    states = load_checkpoint(checkpoint, clock)
    if states is not None:
        vae.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
    amount = torch.cat([green_magenta(chunk).abs().mean(dim=(1, 2, 3)) for chunk in pictures.split(64)])
    chances = 0.5 + amount / amount.mean()
    while clock.done < 1.0:
        set_learning_rate(optimizer, recipe.learning_rate * learning_rate_factor(clock.done, recipe.warm_up))
        chosen = torch.multinomial(chances, recipe.batch)
        batch = pictures[chosen].contiguous(memory_format=torch.channels_last)
        loss = colour_loss(vae, batch, latents[chosen], recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip_norm)
        optimizer.step()
        clock.tick(float(loss.detach()))
        clock.report(every=25)
        if clock.checkpoint_due():
            save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})
            print(f"PSNR of some pictures {measure_psnr(vae, pictures[::80]):.2f} dB", flush=True)
    save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})


def write_prepared(vae: AutoencoderKL, pictures: torch.Tensor, source: Path, target: Path) -> None:
    """Makes `target` a prepared folder like `source`, with the new autoencoder and its latents."""
    torch.save(encode_all(vae, pictures) * vae.config.scaling_factor, target / "latents.pt")
    vae.save_pretrained(target / "vae")
    shutil.copytree(source / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    shutil.copyfile(source / "text_tower.pt", target / "text_tower.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="the folder prepare.py wrote")
    parser.add_argument("--decoder", type=Path, required=True, help="the folder finetune_decoder.py wrote")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; becomes a prepared folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = to_tensor(load_glyphs())
    latents = torch.load(arguments.prepared / "latents.pt", weights_only=True)
    vae = AutoencoderKL.from_pretrained(arguments.prepared / "vae").to(memory_format=torch.channels_last)
    vae.load_state_dict(load_states(arguments.decoder / "checkpoint.pt")["model"])
    finetune(vae, latents, pictures, arguments.minutes, arguments.out / "checkpoint.pt")
    write_prepared(vae, pictures, arguments.prepared, arguments.out)


if __name__ == "__main__":
    main()
