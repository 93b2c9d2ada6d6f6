"""Several requests at once over one connection: their steps share forward passes where their shapes agree.

safelight up &
SAFELIGHT_ENDPOINT=127.0.0.1:7000 python examples/async_client.py
"""

from __future__ import annotations

import asyncio

from safelight import AsyncClient

PROMPTS = ("a red circle", "a blue square", "a green triangle")


async def main() -> None:
    """Draw all prompts and save them as async-0.png, async-1.png …"""
    async with AsyncClient() as client:
        results = await asyncio.gather(*(client.generate(prompt, steps=20, seed=42) for prompt in PROMPTS))
    for index, result in enumerate(results):
        result.images[0].image.save(f"async-{index}.png")


if __name__ == "__main__":
    asyncio.run(main())
