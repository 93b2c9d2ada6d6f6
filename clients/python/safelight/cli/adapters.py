"""`safelight adapters`: LoRAs of a running gateway."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from safelight.errors import InvalidRequestError
from safelight.sync import Client
from safelight.types import Adapter

app = typer.Typer(no_args_is_help=True, help="LoRAs of a gateway: load, list and unload them while it serves.")

_Model = Annotated[str | None, typer.Option(help="Name of the model; needed where there are several.")]
_Endpoint = Annotated[str | None, typer.Option(help="Gateway; default: SAFELIGHT_ENDPOINT.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command()
def load(
    path: Annotated[str, typer.Argument(help="A safetensors file, or a folder with one, as the servers see it.")],
    name: Annotated[str | None, typer.Option(help="What requests call it; default: the file's name.")] = None,
    model: _Model = None,
    endpoint: _Endpoint = None,
    as_json: _Json = False,
) -> None:
    """Load a LoRA on every replica, and tell what each made of it."""
    with Client(endpoint) as client:
        _show([client.load_adapter(path, name=name, model=model)], as_json)


@app.command("list")
def list_(model: _Model = None, endpoint: _Endpoint = None, as_json: _Json = False) -> None:
    """List a model's LoRAs."""
    with Client(endpoint) as client:
        _show(client.list_adapters(model=model), as_json)


@app.command()
def unload(
    name: Annotated[str, typer.Argument(help="Its name.")], model: _Model = None, endpoint: _Endpoint = None
) -> None:
    """Unload a LoRA when the requests that use it have ended."""
    with Client(endpoint) as client:
        client.unload_adapter(name, model=model)


def parse_adapters(field: str, texts: Sequence[str]) -> dict[str, float]:
    """Scales by names, of NAME=SCALE texts; without a scale it is 1.

    Raises:
        InvalidRequestError: a scale is no number.
    """
    scales = {}
    for text in texts:
        name, found, scale = text.rpartition("=")
        try:
            scales[name if found else text] = float(scale) if found else 1.0
        except ValueError as error:
            raise InvalidRequestError.of(field, f"is {text!r}; must be NAME or NAME=SCALE, e.g. style=0.8") from error
    return scales


def _show(adapters: Sequence[Adapter], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(adapter) for adapter in adapters], indent=2))
        return
    table = Table("adapter", "stage", "replica", "layout", "keys", "not matched", "MiB", box=None)
    for adapter in adapters:
        for report in adapter.reports:
            table.add_row(
                adapter.name,
                report.stage,
                report.replica,
                report.layout,
                str(report.matched_keys),
                str(report.unmatched_count),
                f"{report.bytes / 2**20:.1f}",
            )
    Console().print(table)
    for adapter in adapters:
        for key in sorted({key for report in adapter.reports for key in report.unmatched_keys}):
            typer.echo(f"safelight: warning: {adapter.name}: {key} matches nothing", err=True)
