"""A picture drawn over: first the whole of it, then its left half, while the right half stays to the pixel.

    python examples/image_to_image.py [weights.safetensors | folder]

Without an argument it draws with the small model that comes with Safelight.
"""

from __future__ import annotations

import sys

from PIL import Image

from safelight import SDImagePipeline

if __name__ == "__main__":
    pipe = SDImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "demo")
    apple = pipe(prompt="a red apple", seed=3)
    pipe(prompt="a green apple", input_image=apple, denoising_strength=0.6, seed=5).save("green.png")

    mask = Image.new("L", apple.size, "black")  # kept
    mask.paste("white", (0, 0, apple.width // 2, apple.height))  # repainted
    pipe(prompt="a green apple", input_image=apple, mask_image=mask, seed=5).save("half.png")
