"""One request that runs, or has run: what was asked, what has happened, and who still wants to know."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from gateway.journal import Journal
from safelight.errors import RequestCancelledError
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.work_pb2 import WorkContext


@dataclass(eq=False)
class Run:
    """One request.

    Args:
        context: who asked.
        digest: of what was asked for; a repeated call asks for the same.
        journal: what happens to it.
        task: its work.
        calls: how many read its journal now.
        timer: ends it when nobody comes back, or forgets it when it is old.
    """

    context: WorkContext
    digest: bytes
    journal: Journal
    task: asyncio.Task[None] | None = None
    calls: int = 0
    timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What a repeated call is known by; only a request with an idempotency key can be repeated."""
        return self.context.tenant, self.context.idempotency_key

    def is_named_by(self, context: WorkContext) -> bool:
        """Whether a Cancel means this request."""
        if self.context.tenant != context.tenant:
            return False
        if context.idempotency_key:
            return self.context.idempotency_key == context.idempotency_key
        return self.context.request_id == context.request_id

    def stop_timer(self) -> None:
        """Leave the request as it is."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def outcome(task: asyncio.Task[None]) -> BaseException | None:
    """What a request's work ended with; None: its result."""
    if task.cancelled():
        return RequestCancelledError("the request was cancelled; its work has been stopped")
    return task.exception()


def digest(request: GenerateRequest) -> bytes:
    """Tells requests apart by what they ask for, not by when and under which name."""
    asked = GenerateRequest()
    asked.CopyFrom(request)
    asked.after_sequence = 0
    asked.context.request_id = ""
    asked.context.ClearField("deadline")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()
