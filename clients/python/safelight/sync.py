"""The blocking client: the asynchronous one, on an event loop of its own in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safelight.attachment import CANCEL_SECONDS
from safelight.client import DEFAULT_LIST_SECONDS, DEFAULT_LOAD_SECONDS, DEFAULT_RETRY, AsyncClient
from safelight.errors import InternalError
from safelight.options import GenerationOptions
from safelight.retry import RetryPolicy
from safelight.types import Adapter, Event, GenerationResult, Model

Result = TypeVar("Result")

_SETTLE_SECONDS = 1.0
_CLEAN_UP_SECONDS = CANCEL_SECONDS + 1.0


class Client:
    """Talks to a gateway, from ordinary code; safe to share between threads.

    >>> with Client("localhost:7000") as client:
    ...     client.generate("a cat").images[0].image.save("cat.png")

    Args:
        endpoint: "host:port" or "unix:/path"; None takes the environment variable SAFELIGHT_ENDPOINT.
        retry: how long it waits for a busy or a lost gateway; RetryPolicy.none: not at all.
    """

    def __init__(self, endpoint: str | None = None, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopping = False
        self._lock = threading.Lock()  # no work is begun on a loop that stops: nobody would end its wait
        self._thread = threading.Thread(target=self._loop.run_forever, name="safelight-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(_make(endpoint, retry))
        except BaseException:
            self._stop_loop()
            raise

    @property
    def endpoint(self) -> str:
        """The gateway's address."""
        return self._client.endpoint

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in progress are cancelled, and with them their work. May be repeated."""
        if not self._stopping:
            self._wait(_end(self._client))
            self._stop_loop()

    def generate(
        self,
        prompt: str,
        *,
        timeout_seconds: float | None = None,
        idempotency_key: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> GenerationResult:
        """As AsyncClient.generate; `on_event` is called in the calling thread, and may raise to stop the work."""
        stream = self.stream(
            GenerationOptions(prompt=prompt, **options),
            timeout_seconds=timeout_seconds,
            idempotency_key=idempotency_key,
        )
        # closing: the work stops when on_event raises, not when the traceback that holds the generator is dropped.
        with closing(stream) as events:
            for event in events:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, GenerationResult):
                    return event
        raise InternalError("the gateway ended the stream without a result")

    def stream(
        self,
        options: GenerationOptions,
        *,
        timeout_seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> Generator[Event, None, None]:
        """As AsyncClient.stream."""
        events = self._client.stream(options, timeout_seconds=timeout_seconds, idempotency_key=idempotency_key)
        try:
            while (event := self._wait(anext(events, None))) is not None:
                yield event
        finally:
            if not self._stopping:
                self._wait(events.aclose())

    def models(self, *, timeout_seconds: float = DEFAULT_LIST_SECONDS) -> list[Model]:
        """As AsyncClient.models."""
        return self._wait(self._client.models(timeout_seconds=timeout_seconds))

    def load_adapter(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        model: str | None = None,
        timeout_seconds: float = DEFAULT_LOAD_SECONDS,
    ) -> Adapter:
        """As AsyncClient.load_adapter."""
        work = self._client.load_adapter(path, name=name, model=model, timeout_seconds=timeout_seconds)
        return self._wait(work)

    def list_adapters(
        self, *, model: str | None = None, timeout_seconds: float = DEFAULT_LIST_SECONDS
    ) -> list[Adapter]:
        """As AsyncClient.list_adapters."""
        return self._wait(self._client.list_adapters(model=model, timeout_seconds=timeout_seconds))

    def unload_adapter(
        self, name: str, *, model: str | None = None, timeout_seconds: float = DEFAULT_LOAD_SECONDS
    ) -> None:
        """As AsyncClient.unload_adapter."""
        self._wait(self._client.unload_adapter(name, model=model, timeout_seconds=timeout_seconds))

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of work on the client's loop; Ctrl-C while waiting cancels the work and lets it clean up."""
        ended = threading.Event()
        with self._lock:
            if self._stopping:
                work.close()
                raise RuntimeError("the client is closed; make another one")
            future = asyncio.run_coroutine_threadsafe(_marked(work, ended), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(_CLEAN_UP_SECONDS)
            raise

    def _stop_loop(self) -> None:
        with self._lock:
            self._stopping = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _marked(work: Coroutine[Any, Any, Result], ended: threading.Event) -> Result:
    """The work's result; the event is set when it has ended, however that was."""
    try:
        return await work
    finally:
        ended.set()


async def _end(client: AsyncClient) -> None:
    """Close the client, and let gRPC's own tasks see the end of their calls before the loop stops."""
    await client.close()
    if pending := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(pending, timeout=_SETTLE_SECONDS)


async def _make(endpoint: str | None, retry: RetryPolicy) -> AsyncClient:
    """An AsyncClient, made on the loop that it will run on."""
    return AsyncClient(endpoint, retry=retry)
