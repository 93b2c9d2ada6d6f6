"""The embedded stack: all four services in a child process of this one, over a unix socket.

The child never outlives its parent: it stops when the pipe to its standard input closes, which the operating system
does also when the parent crashes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safelight.errors import CheckpointError, InvalidRequestError, SafelightError, StageUnavailableError

_PACKAGE = Path(__file__).resolve().parent
_STOP_SECONDS = 15.0
_DEATH_SECONDS = 2.0
_LOG_LINES = 20
# What comes before the sentence that services/stack.py, or argparse, ends with.
_SENTENCE_MARKS = ("\nsafelight: ", ": error: ")
# The path of a unix socket has at most about 100 bytes; ours adds some 50 to that of the folder for temporary files.
_LONGEST_TEMPORARY_FOLDER = 45
# Set before torch starts; see docs/performance.md. glibc gives a thread's large blocks back to the system when they are
# freed, and a step on a thread other than the main one then spends a tenth of its time on fresh pages.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
_LOG_LEVEL_VARIABLE = "SAFELIGHT_STACK_LOG_LEVEL"
# Exit codes of services/stack.py.
_ERRORS: dict[int, type[SafelightError]] = {2: InvalidRequestError, 3: CheckpointError}


def server_root() -> Path:
    """The folder that holds `services` and `gateway`: the checkout, or the copy that a wheel carries.

    Raises:
        StageUnavailableError: this installation has neither.
    """
    for folder in (_PACKAGE.parents[2], _PACKAGE / "_server"):
        if (folder / "services" / "stack.py").is_file():
            return folder
    raise StageUnavailableError("this installation carries no servers: install 'safelight[local]', or give an endpoint")


def server_environment() -> dict[str, str]:
    """The environment for a child that runs the servers: they and this package first on its import path."""
    paths = [str(server_root()), str(_PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {**_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class EmbeddedStack:
    """Runs the stack while it lives.

    >>> with EmbeddedStack() as stack, Client(stack.endpoint) as client:
    ...     client.generate("a cat").images[0].image.save("cat.png")

    Args:
        models: entries of a manifest (docs/models.md); empty: the demo model.
        settings: settings of the stack, e.g. device="cuda:0" (see `safelight up --help`); None leaves a default.

    Raises:
        InvalidRequestError: a setting or an entry is wrong.
        CheckpointError: a model's weights can't be loaded.
        StageUnavailableError: the stack did not start for another reason; the message has its last words.
    """

    def __init__(self, models: Sequence[Mapping[str, Any]] = (), **settings: Any) -> None:
        root = server_root()
        self._folder = _make_folder()
        self.endpoint = f"unix:{self._folder}/gateway.sock"
        self._process = _launch(root, self._folder, self._flags(models, settings))
        self._finalizer = weakref.finalize(self, _stop, self._process, self._folder)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EmbeddedStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the stack and wait for its end; may be repeated."""
        self._finalizer()

    def check(self) -> None:
        """Find out whether the stack still runs.

        Raises:
            StageUnavailableError: it has been closed, or has ended by itself; the message has its last words.
        """
        if not self._finalizer.alive:
            raise StageUnavailableError("the embedded stack is closed; start another one")
        try:
            code = self._process.wait(_DEATH_SECONDS)  # a dying process closes its connections before it ends
        except subprocess.TimeoutExpired:
            return
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise StageUnavailableError(
            f"the embedded stack has ended ({cause}); close this one and start another. {self._last_words()}".rstrip()
        )

    def _flags(self, models: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
        arguments = {
            "listen": self.endpoint,
            "log_level": os.environ.get(_LOG_LEVEL_VARIABLE, "warning"),
            "manifest": self._write_manifest(models) if models else None,
            **settings,
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if value is not None]

    def _write_manifest(self, models: Sequence[Mapping[str, Any]]) -> Path:
        manifest = self._folder / "manifest.yaml"  # JSON is YAML
        manifest.write_text(json.dumps({"models": list(models)}), encoding="utf-8")
        return manifest

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, _, text = line.decode(errors="replace").rstrip().partition(" ")
            if kind == "ready":
                return
            sys.stderr.write(f"safelight: {text}\n")  # what it fetches from hubs, which may take long
        error_class = _ERRORS.get(self._process.wait(), StageUnavailableError)
        raise error_class(f"the embedded stack did not start: {self._last_words()}")

    def _last_words(self) -> str:
        """The sentence that the stack ended with, or else the last lines of its log."""
        log = (self._folder / "log").read_text(encoding="utf-8", errors="replace")
        for mark in _SENTENCE_MARKS:
            _, found, sentence = f"\n{log}".rpartition(mark)
            if found:
                return sentence.strip()
        return "\n".join(["", *log.splitlines()[-_LOG_LINES:]]).rstrip()


def _make_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="safelight-", dir=parent if len(parent) <= _LONGEST_TEMPORARY_FOLDER else "/tmp")
    )


def _launch(root: Path, folder: Path, flags: Sequence[str]) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(root / "services" / "embedded.py"), str(folder), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**server_environment(), "TMPDIR": str(folder)},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
