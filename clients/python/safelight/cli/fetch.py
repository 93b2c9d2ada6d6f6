"""`safelight fetch`: models from a hub into the cache, before anything needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from safelight.hub import HUBS, fetch_model


def fetch(
    model: Annotated[str, typer.Argument(help="The model's name at the hub, owner/name.", show_default=False)],
    path: Annotated[list[str] | None, typer.Option(help="A file, wildcard or folder; may be repeated.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the hub's branch.")] = None,
    source: Annotated[str, typer.Option(help=f"The hub: {' or '.join(HUBS)}.")] = "modelscope",
) -> None:
    """Fetch a model's files, and write where they are; without a path, all of them.

    The token for a private model is read from MODELSCOPE_API_TOKEN or HF_TOKEN.
    """
    found = fetch_model(model, revision, path, source=source, fetch_safetensors=False)
    typer.echo(found if isinstance(found, str) else "\n".join(found))
