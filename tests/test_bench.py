"""Every benchmark runs, in its tiny mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import QUICK

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_a_benchmark_runs(command: tuple[str, ...]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stdout
