"""Turns the trained autoencoder into what the UNet trains on: balanced latents, a scaling factor and a tokenizer.

The four latent channels come out of training with their own means and spreads. Both sides of the latent are 1x1
convolutions, so the channels can be centred and brought to one common spread exactly, by folding the change into
`quant_conv` and its inverse into `post_quant_conv`. The common spread then goes into the VAE's `scaling_factor`.

    python -m examples.demo_model.prepare --vae /tmp/demo/vae --out /tmp/demo/prepared
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from examples.demo_model.captions import TEMPLATES, article, build_subjects
from examples.demo_model.glyphs import load_glyphs, to_tensor
from examples.demo_model.tokenizer import save_tokenizer
from examples.demo_model.train_vae import VaeRecipe, build_vae
from examples.demo_model.training import load_states

MAX_TOKENS = 32


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """The latents (posterior modes) of all pictures, not yet scaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(batch)])


@torch.no_grad()
def balance_channels(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Centres the channels and gives them one spread, inside the VAE's weights; returns the balanced latents."""
    mean = latents.mean(dim=(0, 2, 3))
    spread = latents.std(dim=(0, 2, 3))
    gain = spread.mean() / spread
    encode, decode = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    # post_quant_conv(z) must see z = z' / gain + mean; change it first, while its weights still meet z.
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight /= gain.view(1, -1, 1, 1)
    # quant_conv's first channels are the mean of the posterior, its last the logarithm of the variance.
    encode.weight[:channels] *= gain.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) * gain
    encode.bias[channels:] += 2.0 * gain.log()
    return (latents - mean.view(1, -1, 1, 1)) * gain.view(1, -1, 1, 1)


def training_texts() -> list[str]:
    """Every name, alone and in every template: what the tokenizer is trained on."""
    names = [name for subject in build_subjects(load_glyphs()) for name in subject.names]
    templates = [text.format("", a="a") for text, _ in TEMPLATES]
    return [*names, *(f"{article(name)} {name}" for name in names), *templates * (len(names) // len(templates))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="the folder train_vae.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pictures = to_tensor(load_glyphs())
    vae = build_vae(VaeRecipe())
    vae.load_state_dict(load_states(arguments.vae / "checkpoint.pt")["model"])
    latents = balance_channels(vae, encode_all(vae, pictures))
    scaling_factor = round(1.0 / float(latents.std()), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.save_pretrained(arguments.out / "vae")
    torch.save(latents * scaling_factor, arguments.out / "latents.pt")
    vocabulary = save_tokenizer(arguments.out / "tokenizer", training_texts(), MAX_TOKENS)
    print(f"scaling factor {scaling_factor}, vocabulary {vocabulary}")


if __name__ == "__main__":
    main()
