"""A hub of each kind on the loopback, and an empty cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.model_hubs import HuggingFaceHub, ModelHub, ModelScopeHub

WEIGHTS = bytes(range(256)) * (24 * 4096)  # 24 MiB: huggingface_hub writes 10 MiB at a time
FILES = {
    "b.safetensors": WEIGHTS,
    "a.safetensors": b"small weights",
    "README.md": b"# tiny\n",
    "vae/config.json": b"{}",
    "vae/model.safetensors": b"vae weights",
}
MODEL = "acme/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an environment without anybody's tokens."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MODELSCOPE_", "MS_", "DIFFSYNTH_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "cache"
    for name, value in {
        "SAFELIGHT_CACHE": folder,
        "MODELSCOPE_HOME": tmp_path,
        "HF_TOKEN_PATH": tmp_path / "token",
    }.items():
        monkeypatch.setenv(name, str(value))
    return folder


@pytest.fixture(params=["modelscope", "huggingface"])
def source(request: pytest.FixtureRequest) -> str:
    """Each hub's name."""
    return str(request.param)


@pytest.fixture
def hub(source: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """That hub with one model at two revisions."""
    if source == "modelscope":
        hub: ModelHub = ModelScopeHub({MODEL: {"master": FILES, "v1": {"a.safetensors": b"older"}}})
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    else:
        hub = HuggingFaceHub({MODEL: {"main": FILES, "v1": {"a.safetensors": b"older"}}})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hubs' libraries try again at once."""
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 1)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    for module in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
