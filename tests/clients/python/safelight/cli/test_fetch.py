"""`safelight fetch` writes where the files are, and one sentence when they can't be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.cli import run
from tests.support.model_hubs import ModelScopeHub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the one model of a hub goes in the cache."""
    hub = ModelScopeHub({"acme/tiny": {"master": {"a.safetensors": b"a", "b.safetensors": b"b", "c.json": b"{}"}}})
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "modelscope" / "acme" / "tiny" / "__version"
    hub.close()


def test_the_paths_are_written_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fetch", "acme/tiny", "--path", "c.json", "--path", "*.safetensors"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert paths == [str(folder / name) for name in ("c.json", "a.safetensors", "b.safetensors")]
    assert all(Path(path).is_file() for path in paths)


def test_without_a_path_the_folder_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fetch", "acme/tiny"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"a.safetensors", "b.safetensors", "c.json"}


def test_what_is_not_there_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fetch", "acme/none"]) != 0
    assert "acme/none at modelscope: not found (HTTP 404): check the name" in capsys.readouterr().err
