"""The examples run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.clients.processes import ROOT, start


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("text_to_image.py", ["image.png"]),
        ("image_to_image.py", ["green.png", "half.png"]),
        ("remote_client.py", ["remote.json", "remote.png"]),
        ("async_client.py", ["async-0.png", "async-1.png", "async-2.png"]),
    ],
)
def test_an_example_draws(script: str, files: list[str], endpoint: str, scratch: Path) -> None:
    arguments = [str(ROOT / "examples" / script), *(["tiny"] if script.endswith("to_image.py") else [])]
    with start(["-W", "error", *arguments], scratch, SAFELIGHT_ENDPOINT=endpoint) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert sorted(path.name for path in scratch.iterdir()) == files
    for file in scratch.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.size == (128, 128)
