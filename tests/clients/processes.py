"""Scripts in processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLI = ["-c", "from safelight.cli import main; main()"]
PATIENCE_SECONDS = 100.0


def start(arguments: Sequence[str], scratch: Path, **variables: str) -> subprocess.Popen[str]:
    """Start Python with `scratch` for its temporary files."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=scratch,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", **variables},
    )


def run_cli(*arguments: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    with start([*CLI, *arguments], scratch) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def servers_of(scratch: Path) -> list[int]:
    """Process ids of the embedded stacks that keep their files in `scratch`."""
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _uses(folder, scratch)]


def _uses(process: Path, scratch: Path) -> bool:
    try:
        return f"services/embedded.py\0{scratch}/" in (process / "cmdline").read_text(errors="replace")
    except OSError:  # it has ended in the meantime
        return False


def wait_for(what: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


def nothing_left(scratch: Path) -> bool:
    """Whether neither processes nor files of an embedded stack are left."""
    return wait_for(lambda: not servers_of(scratch) and not list(scratch.glob("safelight-*")))
