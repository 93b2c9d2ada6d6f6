"""The command `safelight`. It exits 0 when all went well, 2 on wrong input, 130 after Ctrl-C, and 1 otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from safelight.cli.app import app
from safelight.errors import (
    InvalidRequestError,
    SafelightError,
    UnknownAdapterError,
    UnknownModelError,
    UnsupportedError,
)

_WRONG_INPUT = 2
_FAILED = 1
_INTERRUPTED = 130
# Typer's errors of usage: click's class, or its own copy of it, as its version may be; it exports but the subclass.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code. What went wrong is told on stderr in a sentence."""
    try:
        code: int = app(arguments, prog_name="safelight", standalone_mode=False) or 0
        return _fail(code, "stopped") if code == _INTERRUPTED else code  # some versions of Typer catch Ctrl-C
    except _UsageError as error:
        return _fail(_WRONG_INPUT, error.format_message())
    except (InvalidRequestError, UnsupportedError, UnknownModelError, UnknownAdapterError) as error:
        return _fail(_WRONG_INPUT, error.message)
    except SafelightError as error:
        return _fail(_FAILED, error.message)
    except OSError as error:
        return _fail(_FAILED, str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, "stopped")


def _fail(code: int, sentence: str) -> int:
    if sentence:  # it is empty where the help has been shown instead
        typer.echo(f"safelight: {sentence}", err=True)
    return code
