"""Laws of mapped memory: pages of a file are given back and can be read again, and nothing else is touched."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.modeling.mapped_memory import release_mapped
from services.modeling.weights import open_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


def resident_file_bytes() -> int:
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_pages_of_a_file_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(2**23, dtype=torch.float32)}, tmp_path / "a.safetensors")
    mapped = open_checkpoint(tmp_path / "a.safetensors").tensor("weight")
    total = mapped.sum()
    before = resident_file_bytes()
    release_mapped(mapped)
    assert resident_file_bytes() < before - 0.9 * mapped.nbytes
    assert mapped.sum() == total


@pytest.mark.parametrize("size", [1, 2**22])
def test_other_memory_keeps_its_bytes(size: int) -> None:
    tensor = torch.ones(size)
    release_mapped(tensor)
    assert tensor.sum() == size
