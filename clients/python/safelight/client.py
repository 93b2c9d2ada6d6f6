"""The asynchronous client of a gateway. `sync.py` derives the blocking one from it."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from safelight.attachment import Attachment
from safelight.errors import InternalError, InvalidRequestError
from safelight.link import Link
from safelight.messages import to_adapter, to_models, to_request
from safelight.options import GenerationOptions
from safelight.retry import Retries, RetryPolicy
from safelight.types import Adapter, Event, GenerationResult, Model
from safelight.v1 import adapter_service_pb2, model_service_pb2

Answer = TypeVar("Answer")

ENDPOINT_VARIABLE = "SAFELIGHT_ENDPOINT"
DEFAULT_LIST_SECONDS = 10.0
DEFAULT_LOAD_SECONDS = 300.0
DEFAULT_RETRY = RetryPolicy()


class AsyncClient:
    """Talks to a gateway; one connection, any number of calls at once.

    >>> async with AsyncClient("localhost:7000") as client:
    ...     result = await client.generate("a cat")
    ...     result.images[0].image.save("cat.png")

    A request that the gateway has no room for is sent again when the gateway says so. One whose connection breaks is
    taken up again where it was, and is never made twice.

    Args:
        endpoint: "host:port" or "unix:/path"; None takes the environment variable SAFELIGHT_ENDPOINT.
        retry: how long it waits for a busy or a lost gateway; RetryPolicy.none: not at all.

    Raises:
        InvalidRequestError: no endpoint is given anywhere.
    """

    def __init__(self, endpoint: str | None = None, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        target = endpoint or os.environ.get(ENDPOINT_VARIABLE)
        if not target:
            raise InvalidRequestError.of("endpoint", f"is missing; give one, or set {ENDPOINT_VARIABLE}")
        self.endpoint = target
        self._link = Link(target)
        self._retry = retry
        self._attachments: set[Attachment] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled, and with them their work."""
        await asyncio.gather(*(attachment.close() for attachment in self._attachments))
        await self._link.close()

    async def generate(
        self,
        prompt: str,
        *,
        timeout_seconds: float | None = None,
        idempotency_key: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Make pictures and wait for them.

        Args:
            prompt: what they shall show.
            timeout_seconds: time for all of it, waits included; the work is stopped then. None: no limit.
            idempotency_key: as in `stream`.
            on_event: called with everything that happens on the way.
            options: the fields of GenerationOptions.

        Raises:
            SafelightError: see safelight.errors.
        """
        stream = self.stream(
            GenerationOptions(prompt=prompt, **options),
            timeout_seconds=timeout_seconds,
            idempotency_key=idempotency_key,
        )
        async with aclosing(stream) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, GenerationResult):
                    return event
        raise InternalError("the gateway ended the stream without a result")

    async def stream(
        self,
        options: GenerationOptions,
        *,
        timeout_seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, as it happens; the last event is its GenerationResult.

        Leaving the loop early cancels the request. When the gateway has lost the request, everything comes anew, from
        Accepted on.

        Args:
            options: what to make.
            timeout_seconds: time for all of it, waits included; the work is stopped then. None: no limit.
            idempotency_key: names the request within its tenant: a repeated call with this key, from another process
                too, takes part in the first one and gets its result, which a gateway keeps for a while. None: one is
                drawn.

        Raises:
            SafelightError: see safelight.errors.
        """
        if idempotency_key == "":
            raise InvalidRequestError.of("idempotency_key", "is empty; give a name, or None for one of its own")
        key = idempotency_key if idempotency_key is not None else uuid.uuid4().hex
        # In a thread: a picture may have to be read or compressed.
        request = await asyncio.to_thread(to_request, options, idempotency_key=key, timeout_seconds=timeout_seconds)
        attachment = Attachment(self._link, request, Retries(self._retry, timeout_seconds))
        self._attachments.add(attachment)
        try:
            async with aclosing(attachment.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._attachments.discard(attachment)

    async def models(self, *, timeout_seconds: float = DEFAULT_LIST_SECONDS) -> list[Model]:
        """The models that can be used now, sorted by name.

        Raises:
            SafelightError: see safelight.errors.
        """
        request = model_service_pb2.ListModelsRequest()
        response = await self._answer(self._link.models.ListModels(request, timeout=timeout_seconds))
        return to_models(response.models)

    async def load_adapter(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        model: str | None = None,
        timeout_seconds: float = DEFAULT_LOAD_SECONDS,
    ) -> Adapter:
        """Load a LoRA on every replica of a model, while it serves.

        Args:
            path: of a safetensors file, or of a folder with one, as the servers see it.
            name: what requests call it; None: the file's name without its suffix.
            model: whose it is; None if the gateway serves just one.
            timeout_seconds: time for it.

        Raises:
            InvalidRequestError: the name is taken, or the file is damaged, of another family, or of no known layout.
            OutOfMemoryError: a replica holds as many as it may.
            SafelightError: see safelight.errors.
        """
        request = adapter_service_pb2.LoadAdapterRequest(
            model=model or "", name=Path(path).stem if name is None else name, path=str(path)
        )
        response = await self._answer(self._link.adapters.LoadAdapter(request, timeout=timeout_seconds))
        return to_adapter(response.adapter)

    async def list_adapters(
        self, *, model: str | None = None, timeout_seconds: float = DEFAULT_LIST_SECONDS
    ) -> list[Adapter]:
        """The LoRAs that a model has, sorted by name.

        Raises:
            SafelightError: see safelight.errors.
        """
        request = adapter_service_pb2.ListAdaptersRequest(model=model or "")
        response = await self._answer(self._link.adapters.ListAdapters(request, timeout=timeout_seconds))
        return [to_adapter(adapter) for adapter in response.adapters]

    async def unload_adapter(
        self, name: str, *, model: str | None = None, timeout_seconds: float = DEFAULT_LOAD_SECONDS
    ) -> None:
        """Forget a LoRA, when the requests that use it have ended; further ones are refused at once.

        Raises:
            UnknownAdapterError: there is none of that name.
            SafelightError: see safelight.errors.
        """
        request = adapter_service_pb2.UnloadAdapterRequest(model=model or "", name=name)
        await self._answer(self._link.adapters.UnloadAdapter(request, timeout=timeout_seconds))

    async def _answer(self, call: Awaitable[Answer]) -> Answer:
        """The answer to a single call."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            raise self._link.explained(error) from None
        self._link.has_answered = True
        return answer
