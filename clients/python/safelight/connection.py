"""A client, and the embedded stack that it talks to where no endpoint is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from safelight.client import ENDPOINT_VARIABLE
from safelight.embedded import EmbeddedStack
from safelight.errors import InternalError, StageUnavailableError
from safelight.options import GenerationOptions
from safelight.retry import RetryPolicy
from safelight.sync import Client
from safelight.types import Adapter, Event, GenerationResult, Model

_EMBEDDED_RETRY = RetryPolicy(reconnect_seconds=0.0)  # a stack that has ended does not come back


class Connection:
    """Talks to a gateway: a remote one, or that of an embedded stack of its own.

    Args:
        client: of the gateway.
        stack: closed with the connection; None if the gateway is a remote one.
    """

    def __init__(self, client: Client, stack: EmbeddedStack | None = None) -> None:
        self._client = client
        self._stack = stack

    @classmethod
    def to_endpoint(cls, endpoint: str) -> Connection:
        """A connection to a remote gateway."""
        return cls(Client(endpoint))

    @classmethod
    def to_embedded(cls, model: Mapping[str, Any] | None, **settings: Any) -> Connection:
        """A connection to an embedded stack that serves one model.

        Args:
            model: its entry of the manifest; None: the demo model.
            settings: of the stack.

        Raises:
            SafelightError: as EmbeddedStack.
        """
        stack = EmbeddedStack([model] if model else [], **settings)
        return cls(Client(stack.endpoint, retry=_EMBEDDED_RETRY), stack)

    @property
    def endpoint(self) -> str:
        """The gateway's address."""
        return self._client.endpoint

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the client and stop the stack; may be repeated."""
        self._client.close()
        if self._stack is not None:
            self._stack.close()

    def models(self) -> list[Model]:
        """The gateway's models.

        Raises:
            SafelightError: as Client.models.
        """
        try:
            return self._client.models()
        except StageUnavailableError:
            self._check_stack()
            raise

    def generate(
        self,
        options: GenerationOptions,
        on_event: Callable[[Event], None],
        *,
        timeout_seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> GenerationResult:
        """Make pictures; an exception in `on_event` stops the work.

        Raises:
            SafelightError: as Client.stream.
        """
        stream = self._client.stream(options, timeout_seconds=timeout_seconds, idempotency_key=idempotency_key)
        try:
            with closing(stream) as events:
                for event in events:
                    on_event(event)
                    if isinstance(event, GenerationResult):
                        return event
        except StageUnavailableError:
            self._check_stack()
            raise
        raise InternalError("the gateway ended the stream without a result")

    def load_adapter(self, path: str, *, name: str, model: str | None = None) -> Adapter:
        """Load a LoRA; into an embedded stack, a file of this process's own folder, too.

        Raises:
            SafelightError: as Client.load_adapter.
        """
        seen = path if self._stack is None else str(Path(path).absolute())
        return self._client.load_adapter(seen, name=name, model=model)

    def unload_adapter(self, name: str, *, model: str | None = None) -> None:
        """Forget a LoRA.

        Raises:
            SafelightError: as Client.unload_adapter.
        """
        self._client.unload_adapter(name, model=model)

    def _check_stack(self) -> None:
        """Raises the reason when it is that the embedded stack has ended."""
        if self._stack is not None:
            self._stack.check()


def endpoint_or_none(endpoint: str | None) -> str | None:
    """The endpoint given, or that of the environment; None: use an embedded stack."""
    return endpoint or os.environ.get(ENDPOINT_VARIABLE) or None
