"""Measures the exported model: does each caption draw its own picture, and how well does the VAE reproduce pictures?

A drawing is right when, of all training pictures, the one nearest to it (least squared difference over the 128x128 RGB
pixels) is the one its caption names. Sampling is Euler with timesteps linspace(999, 0, n), Safelight's default.

    python -m examples.demo_model.evaluate --model services/demo_model --count 64 --sheet /tmp/demo/sheet.png
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from examples.demo_model.captions import build_subjects
from examples.demo_model.glyphs import PICTURE_SIZE, load_glyphs, to_tensor
from examples.demo_model.train_vae import measure_psnr

CAPTION_HEIGHT = 14
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Sampling:
    """How the drawings are made."""

    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    batch: int = 16


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Loads the model with the Euler sampler in place of the scheduler of the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], sampling: Sampling) -> torch.Tensor:
    """Draws every prompt, prompt number i from seed `sampling.seed + i`, as (N, 3, 128, 128) in [-1, 1]."""
    drawings = []
    for start in range(0, len(prompts), sampling.batch):
        chunk = list(prompts[start : start + sampling.batch])
        generators = [torch.Generator().manual_seed(sampling.seed + start + index) for index in range(len(chunk))]
        images = pipeline(
            chunk,
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=generators,
            output_type="np",
        ).images
        drawings.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(drawings)


def nearest(drawings: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """For every drawing the index of the nearest training picture."""
    return torch.cdist(drawings.flatten(1), pictures.flatten(1)).argmin(dim=1)


def save_sheet(path: Path, prompts: Sequence[str], drawings: torch.Tensor) -> None:
    """Saves a contact sheet, each drawing over its prompt."""
    rows = -(-len(prompts) // SHEET_COLUMNS)
    cell = PICTURE_SIZE + CAPTION_HEIGHT
    sheet = Image.new("RGB", (SHEET_COLUMNS * PICTURE_SIZE, rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = ((drawings.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for index, (prompt, picture) in enumerate(zip(prompts, pixels, strict=True)):
        left, top = index % SHEET_COLUMNS * PICTURE_SIZE, index // SHEET_COLUMNS * cell
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, top))
        pen.text((left + 2, top + PICTURE_SIZE), prompt[:22], fill="black")
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64, help="how many captions to draw")
    parser.add_argument("--seed", type=int, default=0, help="chooses the captions and the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet")
    parser.add_argument("--prompts", nargs="*", help="draw these for the sheet and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = load_pipeline(arguments.model)
    sampling = Sampling(arguments.steps, arguments.guidance, arguments.seed)
    if arguments.prompts:
        save_sheet(arguments.sheet, arguments.prompts, draw(pipeline, arguments.prompts, sampling))
        return
    glyphs = load_glyphs()
    pictures, subjects = to_tensor(glyphs), build_subjects(glyphs)
    chosen = random.Random(arguments.seed).sample(range(len(subjects)), min(arguments.count, len(subjects)))
    names = [subjects[index].names[0] for index in chosen]
    drawings = draw(pipeline, names, sampling)
    found = nearest(drawings, pictures).tolist()
    for name, index, other in zip(names, chosen, found, strict=True):
        if index != other:
            print(f"wrong: {name} is nearest to {subjects[other].names[0]}")
    right = sum(index == other for index, other in zip(chosen, found, strict=True))
    print(f"right: {right} of {len(names)} = {100 * right / len(names):.1f} %")
    print(f"VAE PSNR over {len(pictures)} pictures: {measure_psnr(pipeline.vae, pictures):.2f} dB")
    if arguments.sheet:
        save_sheet(arguments.sheet, names, drawings)


if __name__ == "__main__":
    main()
