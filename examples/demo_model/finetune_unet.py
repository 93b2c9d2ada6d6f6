r"""Trains the UNet of an exported model further, on the latents of the exported autoencoder.

It needs nothing but the exported folder and the font. Computed in float32: not every CPU is faster in bfloat16, see
services/modeling/product_speed.py.

    python -m examples.demo_model.finetune_unet --model services/demo_model --minutes 36 --out /tmp/demo/further
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from examples.demo_model.captions import build_subjects
from examples.demo_model.evaluate import load_pipeline
from examples.demo_model.glyphs import load_glyphs, to_tensor
from examples.demo_model.prepare import encode_all
from examples.demo_model.train_unet import CaptionEncoder, Trainer, UnetRecipe, train
from examples.demo_model.training import load_states

# A lower rate than from scratch, and an average over fewer steps, since there are fewer.
RECIPE = replace(UnetRecipe(), learning_rate=5e-4, ema_decay=0.99, dtype="float32")


def build_trainer(pipeline: StableDiffusionPipeline, pictures: torch.Tensor) -> Trainer:
    """The trainer of the pipeline's UNet, on what its autoencoder makes of the pictures."""
    vae = pipeline.vae
    latents = encode_all(vae, pictures) * vae.config.scaling_factor
    trainer = Trainer(RECIPE, CaptionEncoder(pipeline.tokenizer, pipeline.text_encoder), latents)
    trainer.start_from(pipeline.unet.state_dict())
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder export.py wrote")
    parser.add_argument("--minutes", type=float, default=36.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint and the UNet in half precision"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    glyphs, pipeline = load_glyphs(), load_pipeline(arguments.model)
    trainer, checkpoint = build_trainer(pipeline, to_tensor(glyphs)), arguments.out / "checkpoint.pt"
    train(trainer, build_subjects(glyphs), arguments.minutes, checkpoint)
    pipeline.unet.load_state_dict(load_states(checkpoint)["average"])
    pipeline.unet.half().save_pretrained(arguments.out / "unet")


if __name__ == "__main__":
    main()
