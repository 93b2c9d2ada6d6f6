"""The wheel: the package alone at its top level, and in it the servers with their data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("clients/python", "services", "gateway", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the wheel's files."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for source in SOURCES:  # building leaves files beside the sources
        if (ROOT / source).exists():
            _copy(ROOT / source, copy / source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "-w", str(out), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.egg-info"))
    else:
        shutil.copy(source, target)


def test_the_top_level_is_the_package_alone(names: set[str]) -> None:
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"safelight"}


def test_the_package_is_typed_and_whole(names: set[str]) -> None:
    package = ROOT / "clients" / "python"
    sources = {path.relative_to(package).as_posix() for path in (package / "safelight").rglob("*.py*")}
    assert {name for name in sources if "__pycache__" not in name} <= names
    assert "safelight/py.typed" in names


def test_the_servers_and_their_data_are_in_it(names: set[str]) -> None:
    data = {
        path.relative_to(ROOT).as_posix()
        for folder in ("services", "gateway")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"safelight/_server/{name}" for name in data} <= names
    assert {"services/stack.py", "services/embedded.py", "gateway/__main__.py"} <= data
    assert {"services/encoder/tokenizers/clip/vocab.json", "services/encoder/tokenizers/clip/merges.txt"} <= data


def test_no_compiled_files_are_in_it(names: set[str]) -> None:
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
