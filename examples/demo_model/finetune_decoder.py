r"""Trains the decoder of an exported model further, on the latents that its own UNet draws.

What the user sees is decoded from the UNet's latents, and those differ from the encoder's: guidance makes them bolder,
and fine detail is a guess. So the decoder learns both: the picture from the encoder's latent of it, and the same
picture from what the UNet draws when it is asked for it, by any of its names, from seeds of its own. The encoder and the
latents stay as they are, and so do the UNet and the text tower.

    python -m examples.demo_model.finetune_decoder --model services/demo_model --minutes 35 --out /tmp/demo/decoder
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import nn

from examples.demo_model.captions import Subject, build_subjects, random_caption
from examples.demo_model.evaluate import load_pipeline
from examples.demo_model.glyphs import PICTURE_SIZE, load_glyphs, to_tensor
from examples.demo_model.prepare import encode_all
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
class DecoderRecipe:
    """How the UNet draws and how the decoder is trained. The seeds are far from those that evaluate.py draws with."""

    first_seed: int = 1_000_000
    steps: int = 20
    guidance: float = 4.0
    drawing_batch: int = 32
    batch: int = 4
    learning_rate: float = 1e-3
    warm_up: float = 0.03
    latent_noise: float = 0.05
    ema_decay: float = 0.995
    clip_norm: float = 1.0


def draw_latents(pipeline: StableDiffusionPipeline, captions: Sequence[str], recipe: DecoderRecipe) -> torch.Tensor:
    """What the UNet draws for each caption: latents scaled to unit spread, (N, 4, 16, 16)."""
    drawn = []
    for start in range(0, len(captions), recipe.drawing_batch):
        chunk = list(captions[start : start + recipe.drawing_batch])
        seeds = range(recipe.first_seed + start, recipe.first_seed + start + len(chunk))
        latents = pipeline(
            chunk,
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        drawn.append(latents)
        print(f"drew {start + len(chunk)} of {len(captions)}", flush=True)
    return torch.cat(drawn)


def draw_all(pipeline: StableDiffusionPipeline, subjects: Sequence[Subject], recipe: DecoderRecipe) -> torch.Tensor:
    """Draws every subject twice: by its name with Euler, and by any caption with DPM++ 2M on Karras' schedule.

    Returns (2, N, 4, 16, 16).
    """
    names = [subject.names[0] for subject in subjects]
    generator = random.Random(recipe.first_seed)
    captions = [random_caption(subject, generator) for subject in subjects]
    config = pipeline.scheduler.config
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace")
    by_name = draw_latents(pipeline, names, recipe)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    return torch.stack([by_name, draw_latents(pipeline, captions, recipe)])


class LatentMixer:
    """Latents for the decoder to learn from: the encoder's, the UNet's, or something between the two."""

    def __init__(self, encoded: torch.Tensor, drawn: torch.Tensor, noise: float) -> None:
        self._encoded, self._drawn, self._noise = encoded, drawn, noise

    def __call__(self, chosen: torch.Tensor) -> torch.Tensor:
        """A quarter of the rows is the encoder's, a quarter the UNet's, the others lie between; with a little noise."""
        which = torch.randint(0, len(self._drawn), chosen.shape)
        share = (2 * torch.rand(len(chosen), 1, 1, 1) - 0.5).clamp(0, 1)
        latents = torch.lerp(self._encoded[chosen], self._drawn[which, chosen], share)
        return latents + self._noise * torch.randn_like(latents)


def train(
    vae: AutoencoderKL,
    mix: LatentMixer,
    pictures: torch.Tensor,
    recipe: DecoderRecipe,
    minutes: float,
    checkpoint: Path,
) -> None:
    """Trains decoder and `post_quant_conv` until the minutes are over; the checkpoint's "model" is the moving average."""
    trained = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    average = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    clock = Clock(budget=60.0 * minutes)
    states = load_checkpoint(checkpoint, clock)
    if states is not None:
        trained.load_state_dict(states["current"])
        average = states["model"]
        optimizer.load_state_dict(states["optimizer"])
    order = PictureOrder(len(pictures), recipe.batch)
    while clock.done < 1.0:
        set_learning_rate(optimizer, recipe.learning_rate * learning_rate_factor(clock.done, recipe.warm_up))
        chosen = order.next_batch()
        output = vae.decode(mix(chosen) / vae.config.scaling_factor).sample
        loss = picture_loss(output, pictures[chosen], VaeRecipe())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip_norm)
        optimizer.step()
        clock.tick(float(loss.detach()))
        update_average(average, trained, recipe.ema_decay)
        clock.report(every=50)
        if clock.checkpoint_due() or clock.done >= 1.0:
            states = {"model": average, "current": trained.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, clock, states)


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], trained: nn.Module, decay: float) -> None:
    """Moves the averages towards the current weights."""
    for name, tensor in trained.state_dict().items():
        average[name].lerp_(tensor, 1 - decay)


def save_vae(vae: AutoencoderKL, average: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the autoencoder with the averaged decoder, in half precision, as export.py does."""
    nn.ModuleList([vae.post_quant_conv, vae.decoder]).load_state_dict(average)
    vae.half().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder export.py wrote")
    parser.add_argument("--minutes", type=float, default=35.0, help="of training; the drawing comes on top")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for the latents, the checkpoint and the VAE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe, glyphs = DecoderRecipe(), load_glyphs()
    pictures, pipeline = to_tensor(glyphs), load_pipeline(arguments.model)
    vae, drawn_path = pipeline.vae, arguments.out / "drawn.pt"
    if not drawn_path.exists():
        torch.save(draw_all(pipeline, build_subjects(glyphs), recipe), drawn_path)
    encoded = encode_all(vae, pictures) * vae.config.scaling_factor
    mix = LatentMixer(encoded, torch.load(drawn_path, weights_only=True), recipe.latent_noise)
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    checkpoint = arguments.out / "checkpoint.pt"
    train(vae, mix, pictures, recipe, arguments.minutes, checkpoint)
    save_vae(vae, load_states(checkpoint)["model"], arguments.out / "vae")
    print(f"VAE PSNR over {len(pictures)} pictures: {measure_psnr(vae.float(), pictures):.2f} dB")


if __name__ == "__main__":
    main()
