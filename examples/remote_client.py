"""Pictures from a gateway, from ordinary code: watch the progress, save the file and its receipt, see what it took.

safelight up &
SAFELIGHT_ENDPOINT=127.0.0.1:7000 python examples/remote_client.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from safelight import Client, Event, Progress


def show(event: Event) -> None:
    """A line for each denoising step."""
    if isinstance(event, Progress) and event.stage == "denoiser":
        sys.stdout.write(f"step {event.step} of {event.steps}\n")


if __name__ == "__main__":
    with Client() as client:
        picture = client.generate("a cat", steps=20, seed=42, timeout_seconds=600, on_event=show).images[0]
    Path("remote.png").write_bytes(picture.data)
    Path("remote.json").write_text(picture.receipt.to_json(), encoding="utf-8")  # for `safelight replay`
    for stage in picture.stages:
        sys.stdout.write(f"{stage.stage}: {stage.compute_seconds:.3f} s\n")
