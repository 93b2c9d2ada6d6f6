"""Which request the running coroutine works for: read by the logs, set by the interceptor."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
"""The call context that gRPC hands to a servicer; servicers raise instead of using it."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
