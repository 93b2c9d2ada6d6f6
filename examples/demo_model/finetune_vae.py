"""Trains decoder and encoder further, each on its own, on fixed latents.

The decoder draws what the user sees, and it can go on learning while the UNet trains: it learns to draw each picture
from its cached latents, with a little noise, because the UNet's latents are never exact either. The encoder learns to
make those latents from the picture.

    python -m examples.demo_model.finetune_vae --prepared /tmp/demo/coloured --minutes 12 --out /tmp/demo/finetuned
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from examples.demo_model.glyphs import load_glyphs, to_tensor
from examples.demo_model.train_vae import PictureOrder, VaeRecipe, measure_psnr, picture_loss
from examples.demo_model.training import (
    Clock,
    learning_rate_factor,
    load_checkpoint,
    load_states,
    save_checkpoint,
    set_learning_rate,
)


@dataclass(frozen=True)
class FinetuneRecipe:
    """How the autoencoder is trained further."""

    batch: int = 4
    encoder_every: int = 3
    learning_rate: float = 1.5e-3
    warm_up: float = 0.03
    latent_noise: float = 0.05
    clip_norm: float = 1.0


def decoder_loss(vae: AutoencoderKL, latents: torch.Tensor, pictures: torch.Tensor, noise: float) -> torch.Tensor:
    """The picture loss of decoding `latents` (scaled to unit spread) with a little noise."""
    noisy = latents + noise * torch.randn_like(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae.decode(noisy / vae.config.scaling_factor).sample
    return picture_loss(output, pictures, VaeRecipe())


def encoder_loss(vae: AutoencoderKL, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The squared error of the encoder's latents."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = vae.encode(pictures).latent_dist.mode()
    return (encoded.float() * vae.config.scaling_factor - latents).square().mean()


def finetune(
    vae: AutoencoderKL, latents: torch.Tensor, pictures: torch.Tensor, minutes: float, checkpoint: Path
) -> None:
    """Trains until the minutes are over; the encoder, with its easier task, on every third batch."""
    recipe, clock = FinetuneRecipe(), Clock(budget=60.0 * minutes)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    states = load_checkpoint(checkpoint, clock)
    if states is not None:
        vae.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
    order = PictureOrder(len(pictures), recipe.batch)
    while clock.done < 1.0:
        set_learning_rate(optimizer, recipe.learning_rate * learning_rate_factor(clock.done, recipe.warm_up))
        chosen = order.next_batch()
        target = pictures[chosen].contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        loss = decoder_loss(vae, latents[chosen], target, recipe.latent_noise)
        loss.backward()
        if clock.step % recipe.encoder_every == 0:
            encoder_loss(vae, latents[chosen], target).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip_norm)
        optimizer.step()
        clock.tick(float(loss.detach()))
        clock.report(every=50)
        if clock.checkpoint_due():
            save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})
            print(f"PSNR of some pictures {measure_psnr(vae, pictures[::80]):.2f} dB", flush=True)
    save_checkpoint(checkpoint, clock, {"model": vae.state_dict(), "optimizer": optimizer.state_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="the folder add_colour.py wrote")
    parser.add_argument("--start", type=Path, help="the folder of an earlier run to start from")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = to_tensor(load_glyphs())
    latents = torch.load(arguments.prepared / "latents.pt", weights_only=True)
    vae = AutoencoderKL.from_pretrained(arguments.prepared / "vae").to(memory_format=torch.channels_last)
    if arguments.start:
        vae.load_state_dict(load_states(arguments.start / "checkpoint.pt")["model"])
    finetune(vae, latents, pictures, arguments.minutes, arguments.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
