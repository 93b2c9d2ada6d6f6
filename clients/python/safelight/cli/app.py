"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import typer

from safelight.cli.adapters import app as adapters
from safelight.cli.fetch import fetch
from safelight.cli.generate import generate
from safelight.cli.models import models
from safelight.cli.replay import replay
from safelight.cli.serve import SERVERS, up

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Safelight: image and video diffusion models, served as gRPC stages.",
)
app.command()(generate)
app.command()(replay)
app.command()(models)
app.command()(fetch)
app.add_typer(adapters, name="adapters")
# A server reads its own flags, --help among them.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=_PASS_ON)(up)
for name, serve in SERVERS.items():
    server = typer.Typer(no_args_is_help=True, help=f"The {name} as a server of its own.")
    server.callback()(lambda: None)  # makes `serve` a subcommand, not the command itself
    server.command("serve", context_settings=_PASS_ON)(serve)
    app.add_typer(server, name=name)


@app.command("version")
def show_version() -> None:
    """Tell the version."""
    try:
        typer.echo(f"safelight {version('safelight')}")
    except PackageNotFoundError:
        typer.echo("safelight, from a checkout that is not installed")
