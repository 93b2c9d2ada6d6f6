"""The law of the allocator's setting: a block that was freed is used again without touching its pages anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAULTS_OF_TEN_BLOCKS = """
import resource
from services.common.allocator import keep_freed_memory
keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(): bytes(20 * 1024**2).decode("latin-1")
use()
before = faults()
for _ in range(10): use()
print(faults() - before)
"""


def page_faults(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_TEN_BLOCKS],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT / "clients" / "python"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_freed_blocks_are_used_again_unless_the_environment_decides() -> None:
    pages_of_a_block = 20 * 1024**2 // 4096
    assert page_faults() < pages_of_a_block
    assert page_faults(MALLOC_MMAP_THRESHOLD_="65536") > 10 * pages_of_a_block
