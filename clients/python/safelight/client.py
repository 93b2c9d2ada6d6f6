"""The asynchronous client of a gateway. `sync.py` derives the blocking one from it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc

from safelight.errors import (
    InternalError,
    InvalidRequestError,
    SafelightError,
    StageUnavailableError,
    from_rpc_error,
)
from safelight.messages import EventReader, to_models, to_request
from safelight.types import Event, GenerationOptions, GenerationResult, Model
from safelight.v1 import generation_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc

ENDPOINT_VARIABLE = "SAFELIGHT_ENDPOINT"
DEFAULT_LIST_SECONDS = 10.0
# Trailer of every error that Safelight itself raises.
_STATUS_DETAILS = "grpc-status-details-bin"

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    ("grpc.max_send_message_length", 8 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class AsyncClient:
    """Talks to a gateway; one connection, any number of calls at once.

    >>> async with AsyncClient("localhost:7000") as client:
    ...     result = await client.generate("a cat")
    ...     result.images[0].image.save("cat.png")

    Args:
        endpoint: "host:port" or "unix:/path"; None takes the environment variable SAFELIGHT_ENDPOINT.

    Raises:
        InvalidRequestError: no endpoint is given anywhere.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        target = endpoint or os.environ.get(ENDPOINT_VARIABLE)
        if not target:
            raise InvalidRequestError.of("endpoint", f"is missing; give one, or set {ENDPOINT_VARIABLE}")
        self.endpoint = target
        self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._generation = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled, and with them their work."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        timeout_seconds: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Make pictures and wait for them.

        Args:
            prompt: what they shall show.
            timeout_seconds: by when they must be done; the work is stopped otherwise. None: no limit.
            on_event: called with everything that happens on the way.
            options: the fields of GenerationOptions.

        Raises:
            SafelightError: see safelight.errors.
        """
        stream = self.stream(GenerationOptions(prompt=prompt, **options), timeout_seconds=timeout_seconds)
        async with aclosing(stream) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, GenerationResult):
                    return event
        raise InternalError("the gateway ended the stream without a result")

    async def stream(
        self, options: GenerationOptions, *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, as it happens; the last event is its GenerationResult.

        Leaving the loop early cancels the request.

        Raises:
            SafelightError: see safelight.errors.
        """
        request, reader = to_request(options), EventReader()
        call = self._generation.Generate(request, timeout=timeout_seconds)
        try:
            async for response in call:
                event = reader.read(response)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None
        finally:
            call.cancel()

    async def models(self, *, timeout_seconds: float = DEFAULT_LIST_SECONDS) -> list[Model]:
        """The models that can be used now, sorted by name.

        Raises:
            SafelightError: see safelight.errors.
        """
        try:
            response = await self._models.ListModels(model_service_pb2.ListModelsRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None
        return to_models(response.models)

    def _explained(self, error: grpc.aio.AioRpcError) -> SafelightError:
        """The exception of a failed call; where no gateway has answered, with a remedy."""
        known = from_rpc_error(error)
        answered = any(key == _STATUS_DETAILS for key, _ in error.trailing_metadata() or ())
        if answered or not isinstance(known, StageUnavailableError):
            return known
        return StageUnavailableError(
            f"no gateway answers at {self.endpoint}: start one (safelight up), or correct the endpoint. "
            f"The cause: {known.message}"
        )
