"""The stack as the child of the process that holds the other end of its standard input (safelight/embedded.py).

    python services/embedded.py FOLDER [flags of services.stack]

It never outlives its parent: the pipe closes when the parent ends, also when it is killed, and is watched from the
first moment, before torch is imported. FOLDER, with what was put into it, goes too.

Run by its path, not by `-m`: that would put the user's folder on the import path, and any `services` in it before ours.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path


def _end_with_stdin(folder: str) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)  # ends a stack that still starts; one that serves stops in good order


class _NoteHandler(logging.Handler):
    """Hands messages to the parent, a line of standard output each, while it waits for the stack to be ready."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.write(f"note {record.getMessage()}\n")
        sys.stdout.flush()


def _tell_of_downloads() -> None:
    """They may take long, and the stack's log is a file that nobody looks at."""
    log = logging.getLogger("safelight.hub")
    log.setLevel(logging.INFO)
    log.addHandler(_NoteHandler())


def main() -> None:
    """Exits as services.stack does."""
    own_folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != own_folder]
    threading.Thread(target=_end_with_stdin, args=(sys.argv.pop(1),), daemon=True).start()
    try:
        from services.stack import main as run_stack  # imports torch, which takes seconds
    except ModuleNotFoundError as error:
        sys.exit(f"safelight: package {error.name!r} is missing: pip install 'safelight[local]'")
    _tell_of_downloads()
    run_stack()


if __name__ == "__main__":
    main()
