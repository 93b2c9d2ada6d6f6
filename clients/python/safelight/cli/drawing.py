"""What `generate` and `replay` share: a gateway to draw at, and the work with its progress shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from safelight.cli.progress_bar import ProgressBar
from safelight.connection import Connection
from safelight.options import GenerationOptions
from safelight.types import GenerationResult


def connect(endpoint: str | None, entry: Mapping[str, Any] | None, device: str) -> Connection:
    """The gateway at an endpoint, or an embedded stack.

    Args:
        endpoint: of the gateway; None: an embedded stack.
        entry: the stack's model, as its manifest has it; None: the demo model.
        device: of the stack.

    Raises:
        SafelightError: the stack did not start.
    """
    if endpoint is not None:
        return Connection.to_endpoint(endpoint)
    with Console(stderr=True).status("starting the embedded stack …"):
        return Connection.to_embedded(entry, device=device)


def draw(
    connection: Connection,
    options: GenerationOptions,
    timeout_seconds: float | None = None,
    idempotency_key: str | None = None,
) -> GenerationResult:
    """Make the pictures, and show how far they are; previews are asked for only where they can be shown.

    Raises:
        SafelightError: as Client.stream.
    """
    with ProgressBar(options.num_images) as bar:
        if not bar.shows_previews:
            options = replace(options, preview_every_steps=None)
        return connection.generate(options, bar.show, timeout_seconds=timeout_seconds, idempotency_key=idempotency_key)
