"""Clients that each have one request in flight, and what became of every request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from safelight import (
    AsyncClient,
    GeneratedImage,
    GenerationOptions,
    GenerationResult,
    Progress,
    RetryPolicy,
    SafelightError,
)

_LOST_SECONDS = 120.0


@dataclass
class Drawing:
    """One request's life; times are of `time.monotonic()`.

    Args:
        request: its place in the list of requests.
        started: when it was sent.
        ended: when its result, or its error, was there.
        steps: when each denoising step was reported.
        image: what was made; None: it was lost.
        error: why.
    """

    request: int
    started: float
    ended: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    image: GeneratedImage | None = None
    error: str = ""

    @property
    def seconds(self) -> float:
        """From request to result."""
        return self.ended - self.started


async def draw(client: AsyncClient, request: int, options: GenerationOptions) -> Drawing:
    """Send one request and note what happens; a failure is noted too."""
    drawing = Drawing(request, time.monotonic())
    try:
        async for event in client.stream(options, timeout_seconds=_LOST_SECONDS):
            if isinstance(event, Progress) and event.stage == "denoiser":
                drawing.steps.append((time.monotonic(), event.step))
            elif isinstance(event, GenerationResult):
                drawing.image = event.images[0]
    except SafelightError as error:
        drawing.error = f"{type(error).__name__}: {error}"
    drawing.ended = time.monotonic()
    return drawing


def drawn(drawing: Drawing) -> GeneratedImage:
    """The picture of a drawing.

    Raises:
        RuntimeError: it was lost; says why.
    """
    if drawing.image is None:
        raise RuntimeError(f"request {drawing.request} was lost: {drawing.error}")
    return drawing.image


async def draw_alone(endpoint: str, requests: Sequence[GenerationOptions]) -> list[GeneratedImage]:
    """The picture of every request, made one after the other with nothing else going on.

    Raises:
        RuntimeError: one was lost.
    """
    async with AsyncClient(endpoint, retry=RetryPolicy.none) as client:
        return [drawn(await draw(client, index, options)) for index, options in enumerate(requests)]


class ClosedLoop:
    """So many clients, each with a connection of its own, that take turns at a list of requests.

    The clients do not retry: what the gateway does not make good is lost.

    Args:
        endpoint: the gateway.
        requests: sent in order, over and over.
        clients: how many.
    """

    def __init__(self, endpoint: str, requests: Sequence[GenerationOptions], clients: int) -> None:
        self.drawings: list[Drawing] = []
        self._endpoint = endpoint
        self._requests = itertools.cycle(enumerate(requests))
        self._clients = clients
        self._ending = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    async def end(self) -> list[Drawing]:
        """Send nothing new, wait for what is in flight; returns all drawings."""
        self._ending = True
        if self._task is not None:
            await self._task
        return self.drawings

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self._clients)))

    async def _client(self) -> None:
        async with AsyncClient(self._endpoint, retry=RetryPolicy.none) as client:
            while not self._ending:
                index, options = next(self._requests)
                self.drawings.append(await draw(client, index, options))
