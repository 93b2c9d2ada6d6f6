"""The processes of a service's ranks, as the system sees them."""

from __future__ import annotations

import os
import time
from pathlib import Path

_LIMIT_SECONDS = 60.0


def rank_processes(service: int | None = None) -> list[int]:
    """Process ids of the ranks that a process (None: this one) has started, oldest first."""
    parent = str(service or os.getpid())
    return sorted(int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and _is_rank(each, parent))


def until_gone(processes: list[int]) -> None:
    """Returns when none of the processes runs; fails if that takes too long."""
    give_up = time.monotonic() + _LIMIT_SECONDS
    while any(_state(Path("/proc") / str(process)) not in ("", "Z") for process in processes):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def _is_rank(process: Path, parent: str) -> bool:
    try:
        command = (process / "cmdline").read_bytes()
        return b"ranks/process.py" in command and _status(process)[1] == parent
    except OSError:  # it has ended meanwhile
        return False


def _state(process: Path) -> str:
    try:
        return _status(process)[0]
    except OSError:
        return ""


def _status(process: Path) -> list[str]:
    """State, parent and more."""
    return (process / "stat").read_text().rpartition(")")[2].split()
