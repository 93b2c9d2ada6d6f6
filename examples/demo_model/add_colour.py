"""Gives the latents the axis of colour that the autoencoder's short training has missed, green against magenta.

After its training the autoencoder tells light from dark and blue from orange, but draws a green apple brown; encoder
and decoder would have to discover the axis together. Here the latents are told where to carry it: how green each 8x8
block is, gets added along that direction of latent space in which blocks of one flat colour vary least, so that it
stands in the way of nothing. finetune_vae.py then teaches decoder and encoder, each on its own, to use the new
latents.

    python -m examples.demo_model.add_colour --prepared /tmp/demo/prepared --out /tmp/demo/coloured
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.demo_model.glyphs import load_glyphs, to_tensor

BLOCK = 8
FLAT_SPREAD = 0.08
WHITE = 0.95
GAIN = 1.6


def green_magenta(pictures: torch.Tensor) -> torch.Tensor:
    """Green minus the mean of red and blue, of every block, as (N, 1, 16, 16)."""
    return F.avg_pool2d(pictures[:, 1:2] - (pictures[:, 0:1] + pictures[:, 2:3]) / 2, BLOCK)


def flat_blocks(pictures: torch.Tensor) -> torch.Tensor:
    """Which blocks show one colour that is not white, as (N, 16, 16)."""
    mean = F.avg_pool2d(pictures, BLOCK)
    variance = F.avg_pool2d(pictures.square(), BLOCK) - mean.square()
    return (variance.amax(dim=1) < FLAT_SPREAD**2) & (mean.amin(dim=1) < WHITE)


def quiet_direction(latents: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The unit vector along which the latents of flat blocks vary least."""
    values = latents.permute(0, 2, 3, 1)[flat]
    spreads, directions = torch.linalg.eigh(torch.cov(values.T))
    print(f"variance of flat blocks along the axes: {[round(float(spread), 3) for spread in spreads]}")
    return directions[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="the folder prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="becomes a prepared folder with the new latents")
    arguments = parser.parse_args()
    pictures = to_tensor(load_glyphs())
    shutil.copytree(arguments.prepared, arguments.out, dirs_exist_ok=True)
    latents = torch.load(arguments.prepared / "latents.pt", weights_only=True)
    direction = quiet_direction(latents, flat_blocks(pictures))
    colour = GAIN * green_magenta(pictures)
    print(f"spread of what is added: {float(colour.std()):.3f}")
    torch.save(latents + colour * direction.view(1, -1, 1, 1), arguments.out / "latents.pt")


if __name__ == "__main__":
    main()
