r"""Writes the model folder in Stable Diffusion 1.5's diffusers layout, from the checkpoints of the trainings.

Weights are stored in half precision, under the names SD1.5's files use. The folder is replaced file by file with
renames, so that a reader never meets half a file.

    python -m examples.demo_model.export --prepared /tmp/demo/coloured --vae /tmp/demo/finetuned --unet /tmp/demo/unet \
        --out services/demo_model
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from examples.demo_model.train_text import TextRecipe, build_text_tower
from examples.demo_model.train_unet import UnetRecipe, build_scheduler, build_unet
from examples.demo_model.training import load_states

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TEXT_PREFIX = "text_model."


def load_vae(prepared: Path, finetuned: Path) -> AutoencoderKL:
    """The prepared autoencoder with the weights of its further training."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(prepared / "vae"))
    vae.load_state_dict(load_states(finetuned / "checkpoint.pt")["model"])
    return vae


def build_pipeline(prepared: Path, finetuned: Path, unet_checkpoint: Path) -> StableDiffusionPipeline:
    """Puts the trained parts together."""
    tokenizer = CLIPTokenizer.from_pretrained(prepared / "tokenizer")
    tower = build_text_tower(TextRecipe(), tokenizer)
    tower.load_state_dict(torch.load(prepared / "text_tower.pt", weights_only=True))
    unet = build_unet(UnetRecipe())
    unet.load_state_dict(load_states(unet_checkpoint)["average"])
    return StableDiffusionPipeline(
        vae=load_vae(prepared, finetuned),
        text_encoder=tower,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_text_tower(tower: CLIPTextModel, folder: Path) -> None:
    """Saves under SD1.5's tensor names; the config says float32, so that readers compute in single precision."""
    config = tower.config.to_diff_dict() | {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    states = {TEXT_PREFIX + name: value.half().contiguous() for name, value in tower.state_dict().items()}
    save_file(states, folder / "model.safetensors", metadata={"format": "pt"})


def save_pipeline(pipeline: StableDiffusionPipeline, tokenizer: Path, folder: Path) -> None:
    """Saves all parts; the tokenizer as the four files prepare.py wrote, which is CLIP's own format."""
    tower = pipeline.text_encoder
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    save_text_tower(tower, folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / "tokenizer" / name)


def publish(source: Path, target: Path) -> None:
    """Moves every file of `source` to its place under `target`, each with one rename."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            path.replace(destination)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="the folder add_colour.py wrote")
    parser.add_argument("--unet", type=Path, required=True, help="the folder train_unet.py wrote")
    parser.add_argument("--vae", type=Path, required=True, help="the folder finetune_vae.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipeline = build_pipeline(arguments.prepared, arguments.vae, arguments.unet / "checkpoint.pt")
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=".demo_model_") as temporary:
        save_pipeline(pipeline, arguments.prepared / "tokenizer", Path(temporary))
        publish(Path(temporary), arguments.out)
    files = sorted(path for path in arguments.out.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>10} {path.relative_to(arguments.out)}")
    print(f"{sum(path.stat().st_size for path in files):>10} in total")


if __name__ == "__main__":
    main()
