"""Commands that become a server: it runs in this process, as `python -m` would run it, with the flags passed on."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence

import typer

from safelight.embedded import server_environment, server_root
from safelight.errors import StageUnavailableError


def up(context: typer.Context) -> None:
    """Run all four services on this machine until Ctrl-C (see --help for their settings)."""
    _become("services.stack", context.args)


def _server(module: str) -> Callable[[typer.Context], None]:
    def serve(context: typer.Context) -> None:
        """Serve until Ctrl-C (see --help for the settings)."""
        _become(module, context.args)

    return serve


SERVERS = {
    "encoder": _server("services.encoder"),
    "denoiser": _server("services.denoiser"),
    "decoder": _server("services.decoder"),
    "gateway": _server("gateway"),
}
"""What `safelight <name> serve` runs."""


def _become(module: str, arguments: Sequence[str]) -> None:
    """Run a server's module; its exit code becomes ours.

    Raises:
        StageUnavailableError: the servers, or packages that they need, are not installed.
    """
    sys.path.insert(0, str(server_root()))
    os.environ.update(server_environment())
    sys.argv = [module, *arguments]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a server that still starts ends at once; then it handles it itself
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        raise StageUnavailableError(f"package {error.name!r} is missing: pip install 'safelight[local]'") from error
