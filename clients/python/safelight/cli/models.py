"""`safelight models`: what can be asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from safelight.connection import Connection, endpoint_or_none
from safelight.types import Model


def models(
    endpoint: Annotated[str | None, typer.Option(help="Gateway; default: SAFELIGHT_ENDPOINT, or our own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the models of a gateway; without an endpoint, those of the embedded stack."""
    target = endpoint_or_none(endpoint)
    with Connection.to_embedded(None) if target is None else Connection.to_endpoint(target) as connection:
        served = connection.models()
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in served], indent=2))
    else:
        Console().print(_table(served))


def _table(served: Sequence[Model]) -> Table:
    table = Table("model", "family", "size", "steps", "guidance", "distilled", "samplers", "schedules", box=None)
    for model in served:
        table.add_row(
            model.name,
            model.family,
            f"{model.width}×{model.height}",
            str(model.steps),
            f"{model.guidance_scale:g}",
            "" if model.distilled_guidance_scale is None else f"{model.distilled_guidance_scale:g}",
            " ".join(model.samplers),
            " ".join(model.schedules),
        )
    return table
