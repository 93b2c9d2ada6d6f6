"""The embedded stack: all four services in a child process of this one, over a unix socket.

The child never outlives its parent: it stops when the pipe to its standard input closes, which the operating system
does also when the parent crashes.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safelight.errors import StageUnavailableError

_PACKAGE = Path(__file__).resolve().parent
_STOP_SECONDS = 15.0
_LOG_LINES = 20
# Set before torch starts; see docs/performance.md.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


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
        settings: settings of the stack, e.g. device="cuda:0" (see `safelight up --help`).

    Raises:
        StageUnavailableError: the stack did not start; the message has its last words.
    """

    def __init__(self, models: tuple[Mapping[str, Any], ...] = (), **settings: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="safelight-"))
        self.endpoint = f"unix:{self._folder}/gateway.sock"
        self._process = self._launch(models, settings)
        self._finalizer = weakref.finalize(self, _stop, self._process, self._folder)
        atexit.register(self._finalizer)
        self._wait_until_ready()

    def __enter__(self) -> EmbeddedStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the stack and wait for its end; may be repeated."""
        atexit.unregister(self._finalizer)
        self._finalizer()

    def _launch(self, models: tuple[Mapping[str, Any], ...], settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        arguments = {"listen": self.endpoint, "stop_with_stdin": True, **settings}
        if models:
            manifest = self._folder / "manifest.yaml"  # JSON is YAML
            manifest.write_text(json.dumps({"models": list(models)}))
            arguments["manifest"] = manifest
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
        with (self._folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "services.stack", *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=server_root(),
                env=server_environment(),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().startswith(b"ready"):
            return
        self._process.wait()
        words = "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-_LOG_LINES:])
        self.close()
        raise StageUnavailableError(f"the embedded stack did not start:\n{words}")


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
