"""Trains the UNet of the demo model on cached latents and the frozen text tower.

Epsilon prediction on Stable Diffusion 1.5's noise schedule; one caption in ten is empty, for classifier-free guidance.
As in train_vae.py the learning rate follows the clock and a killed run resumes from its last checkpoint.

    python -m examples.demo_model.train_unet --prepared /tmp/demo/coloured --minutes 60 --threads 1 --out /tmp/demo/unet
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from examples.demo_model.captions import Subject, build_subjects
from examples.demo_model.glyphs import load_glyphs
from examples.demo_model.train_text import TextRecipe, build_text_tower, choose_captions, tokenize
from examples.demo_model.training import (
    Clock,
    learning_rate_factor,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
)


@dataclass(frozen=True)
class UnetRecipe:
    """What the UNet is and how it is trained."""

    widths: tuple[int, ...] = (48, 96, 192)
    attention: tuple[bool, ...] = (False, True, True)
    heads: int = 4
    norm_groups: int = 8
    text_width: int = 128
    batch: int = 32
    learning_rate: float = 1e-3
    warm_up: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    empty_captions: float = 0.1
    ema_decay: float = 0.999
    snr_gamma: float = 5.0
    dtype: str = "bfloat16"


def build_unet(recipe: UnetRecipe) -> UNet2DConditionModel:
    """Builds the untrained UNet. Attention is left out at 16x16, where it would cost most of the compute."""
    down = tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in recipe.attention)
    up = tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(recipe.attention))
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.heads,  # as in Stable Diffusion 1.5, diffusers reads this as the number of heads
        norm_num_groups=recipe.norm_groups,
    )


@torch.no_grad()
def initialise(unet: UNet2DConditionModel) -> None:
    """Starts every residual branch and the output at zero, as the original latent-diffusion code did."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class CaptionEncoder:
    """Runs the frozen text tower once per distinct caption of a batch."""

    def __init__(self, tokenizer: CLIPTokenizer, tower: CLIPTextModel) -> None:
        self._tokenizer = tokenizer
        self._tower = tower

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        distinct = sorted(set(captions))
        hidden: torch.Tensor = self._tower(tokenize(self._tokenizer, distinct)).last_hidden_state
        position = {caption: index for index, caption in enumerate(distinct)}
        return hidden[torch.tensor([position[caption] for caption in captions])]


def step_weights(alphas_cumprod: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """How much each timestep's epsilon error counts.

    Little noise counts less (min-SNR). Much noise counts more, so that the error of the *picture* counts the same at
    every such step: the sampler decides there which picture it draws, and a small epsilon error is a large error of it.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    return (snr_gamma / snr).clamp_max(1.0) * (1.0 + 1.0 / snr)


def spread_timesteps(count: int, total: int) -> torch.Tensor:
    """Random timesteps, one per equal slice of the schedule, in random order; the loss is less noisy so."""
    return ((torch.randperm(count) + torch.rand(count)) * total / count).long().clamp_max(total - 1)


class Trainer:
    """The UNet, its moving average and one step of training."""

    def __init__(self, recipe: UnetRecipe, encode: CaptionEncoder, latents: torch.Tensor) -> None:
        self.recipe = recipe
        self.encode = encode
        self.latents = latents
        self.scheduler = build_scheduler()
        self.weights = step_weights(self.scheduler.alphas_cumprod, recipe.snr_gamma)
        self.unet = build_unet(recipe)
        initialise(self.unet)
        self.average = self._copy()
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )

    def start_from(self, states: Mapping[str, torch.Tensor]) -> None:
        """Takes over weights that are trained already; the average starts there too."""
        self.unet.load_state_dict(states)
        self.average = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.unet.state_dict().items()}

    def loss(self, chosen: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """The weighted epsilon error of one batch."""
        clean = self.latents[chosen]
        noise = torch.randn_like(clean)
        timesteps = spread_timesteps(len(chosen), self.scheduler.config.num_train_timesteps)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            predicted = self.unet(noisy, timesteps, self.encode(captions)).sample
        return ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * self.weights[timesteps]).mean()

    def step(self, chosen: torch.Tensor, captions: Sequence[str], learning_rate: float) -> float:
        """One update of the UNet."""
        set_learning_rate(self.optimizer, learning_rate)
        loss = self.loss(chosen, captions)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Moves the averages; early on they follow faster, so that they are of use from the start."""
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        current = self.unet.state_dict()
        for name, tensor in self.average.items():
            tensor.lerp_(current[name], 1 - decay)

    def states(self) -> dict[str, object]:
        """All that a checkpoint holds."""
        return {"model": self.unet.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}

    def restore(self, states: dict[str, dict[str, torch.Tensor]]) -> None:
        """The inverse of `states`."""
        self.unet.load_state_dict(states["model"])
        self.average = states["average"]
        self.optimizer.load_state_dict(states["optimizer"])


def train(trainer: Trainer, subjects: Sequence[Subject], minutes: float, checkpoint: Path) -> None:
    """Trains until the minutes are over, saving every few of them."""
    recipe, clock = trainer.recipe, Clock(budget=60.0 * minutes)
    states = load_checkpoint(checkpoint, clock)
    if states is not None:
        trainer.restore(states)
    popularity = torch.tensor([subject.weight for subject in subjects])
    while clock.done < 1.0:
        chosen = torch.multinomial(popularity, recipe.batch, replacement=True)
        captions = choose_captions(subjects, chosen, recipe.empty_captions)
        rate = recipe.learning_rate * learning_rate_factor(clock.done, recipe.warm_up)
        clock.tick(trainer.step(chosen, captions, rate))
        trainer.update_average(clock.step)
        clock.report(every=50)
        if clock.checkpoint_due():
            save_checkpoint(checkpoint, clock, trainer.states())
    save_checkpoint(checkpoint, clock, trainer.states())


def load_encoder(prepared: Path) -> CaptionEncoder:
    """The tokenizer and the trained text tower."""
    tokenizer = CLIPTokenizer.from_pretrained(prepared / "tokenizer")
    tower = build_text_tower(TextRecipe(), tokenizer)
    tower.load_state_dict(torch.load(prepared / "text_tower.pt", weights_only=True))
    return CaptionEncoder(tokenizer, tower.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prepared", type=Path, required=True, help="the folder add_colour.py and train_text.py filled"
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="a file with UNet weights to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    latents = torch.load(arguments.prepared / "latents.pt", weights_only=True)
    trainer = Trainer(UnetRecipe(), load_encoder(arguments.prepared), latents)
    if arguments.start:
        trainer.start_from(torch.load(arguments.start, weights_only=True))
    print(f"{sum(parameter.numel() for parameter in trainer.unet.parameters())} parameters", flush=True)
    train(trainer, build_subjects(load_glyphs()), arguments.minutes, arguments.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
