"""One embedded stack for all tests of the SDK: a pipeline that draws with a tiny model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight import SDImagePipeline, SDPipelineConfig


@pytest.fixture(scope="session")
def pipeline(tiny_sd15: Path) -> Iterator[SDImagePipeline]:
    """A pipeline with an embedded stack that decodes in tiles."""
    config = SDPipelineConfig.basic_config(tiny_sd15, device="cpu")
    config.vae_tiled, config.vae_tile_size, config.vae_tile_stride = True, 64, 64
    with SDImagePipeline.from_pretrained(config) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def endpoint(pipeline: SDImagePipeline) -> str:
    """The gateway of the pipeline's stack; its model is called "tiny"."""
    return pipeline._connection.endpoint


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SAFELIGHT_")]:
        monkeypatch.delenv(name)
