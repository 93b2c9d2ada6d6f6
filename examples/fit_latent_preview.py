"""Fits the map that previews are made with: latents to colours, linear, by least squares, for one VAE.

    python -m examples.fit_latent_preview --model /weights/stable-diffusion-v1-5 [--pictures FOLDER] [--output FILE]

With a folder of pictures it pairs their latents with the pictures brought down to the latents' size; without one,
smooth random latents with what the VAE makes of them. A fifth of the pairs is kept out of the fit; R^2 is that of the
fifth. The map goes to latent_preview.json in the model's folder, where the denoiser finds it; for a model in a single
file, give an output, and name it in the manifest as `latent_preview:`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from services.common.manifest import ModelEntry
from services.common.picture_files import PictureError
from services.decoder.images import read_picture
from services.decoder.registry import LOADERS, PictureDecoder
from services.decoder.tiling import DEFAULT_TILING
from services.modeling.components import detect_family

FILE_NAME = "latent_preview.json"
HELD_OUT = 5  # every so many pairs, one
MAX_SIDE = 512
RANDOM_SIDES, RANDOM_SCALES = 32, (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Pair:
    """A latent [C, h, w] and its picture [3, h, w], colours from 0 to 1."""

    latents: Tensor
    colours: Tensor


@dataclass(frozen=True)
class Fit:
    """colour = matrix [3, C] @ latent + bias [3]; r_squared: of pairs that were not fitted."""

    matrix: Tensor
    bias: Tensor
    r_squared: float


def pairs_of_pictures(decoder: PictureDecoder, folder: Path, limit: int) -> Iterator[Pair]:
    """Of up to so many picture files, in order of name; others are passed over."""
    factor = decoder.describe("").decoder.scale_factor
    for path in sorted(path for path in folder.iterdir() if path.is_file())[:limit]:
        try:
            picture = read_picture(path.read_bytes())
        except PictureError:
            continue
        picture = _trimmed(picture, factor)
        yield _pair(decoder.encode(picture, DEFAULT_TILING), picture)


def pairs_of_noise(decoder: PictureDecoder, count: int) -> Iterator[Pair]:
    """Of smooth random latents: noise of several scales, of unit variance in all, as the latents of pictures have."""
    channels = decoder.describe("").decoder.latent_channels
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        layers = [
            F.interpolate(
                torch.randn(1, channels, RANDOM_SIDES // scale, RANDOM_SIDES // scale, generator=generator),
                size=(RANDOM_SIDES, RANDOM_SIDES),
                mode="bicubic",
            )
            for scale in RANDOM_SCALES
        ]
        latents = torch.stack(layers).sum(0) / len(layers) ** 0.5
        yield _pair(latents, decoder.decode(latents, DEFAULT_TILING))


def _trimmed(picture: Tensor, factor: int) -> Tensor:
    """The picture [1, 3, H, W] no larger than MAX_SIDE, its sides multiples of the VAE's factor."""
    height, width = picture.shape[-2:]
    scale = min(1.0, MAX_SIDE / max(height, width))
    size = [max(int(side * scale) // factor, 1) * factor for side in (height, width)]
    return picture if size == [height, width] else F.interpolate(picture, size=size, mode="area")


def _pair(latents: Tensor, picture: Tensor) -> Pair:
    colours = F.interpolate(picture.float().cpu(), size=latents.shape[-2:], mode="area")
    return Pair(latents[0].float().cpu(), ((colours[0] + 1) / 2).clamp(0, 1))


def fit(pairs: list[Pair]) -> Fit:
    """The least squares of all elements of the pairs, but for those held out.

    Raises:
        ValueError: there are too few pairs to hold any out.
    """
    if len(pairs) < HELD_OUT:
        raise ValueError(f"{len(pairs)} pictures are too few: give at least {HELD_OUT}")
    fitted = [pair for index, pair in enumerate(pairs) if index % HELD_OUT]
    solution = torch.linalg.lstsq(_with_one(fitted), _colours(fitted)).solution
    held_out = pairs[::HELD_OUT]
    residual = _colours(held_out) - _with_one(held_out) @ solution
    spread = _colours(held_out) - _colours(held_out).mean(0)
    r_squared = 1 - float(residual.square().sum() / spread.square().sum())
    return Fit(solution[:-1].T.contiguous(), solution[-1], r_squared)


def _with_one(pairs: list[Pair]) -> Tensor:
    """The latents' elements [N, C + 1], each with a 1, which the bias goes with."""
    elements = torch.cat([pair.latents.flatten(1).T for pair in pairs]).double()
    return torch.cat([elements, torch.ones(len(elements), 1, dtype=torch.float64)], dim=1)


def _colours(pairs: list[Pair]) -> Tensor:
    return torch.cat([pair.colours.flatten(1).T for pair in pairs]).double()


def write_map(path: Path, fitted: Fit, fingerprint: str, pictures: int) -> None:
    """Write the file; fingerprint: of the VAE."""
    content = {
        "matrix": [[round(value, 5) for value in row] for row in fitted.matrix.tolist()],
        "bias": [round(value, 5) for value in fitted.bias.tolist()],
        "vae_fingerprint": fingerprint,
        "r_squared": round(fitted.r_squared, 4),
        "pictures": pictures,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder or single file")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures like those to be previewed")
    parser.add_argument("--count", type=int, default=256, help="most pictures, or random latents, to fit")
    parser.add_argument("--output", type=Path, help=f"default: {FILE_NAME} in the model's folder")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    output = arguments.output or arguments.model / FILE_NAME
    entry = ModelEntry(name="model", path=str(arguments.model))
    decoder = LOADERS[detect_family(entry)](entry, torch.device(arguments.device))
    if not isinstance(decoder, PictureDecoder):
        parser.error("--model: makes films; previews are of pictures")
    with torch.inference_mode():
        found = (
            pairs_of_pictures(decoder, arguments.pictures, arguments.count)
            if arguments.pictures
            else pairs_of_noise(decoder, arguments.count)
        )
        pairs = list(found)
    fitted = fit(pairs)
    write_map(output, fitted, decoder.fingerprint, len(pairs))
    print(f"{output}: {len(pairs)} pictures, R^2 {fitted.r_squared:.3f}")


if __name__ == "__main__":
    main()
