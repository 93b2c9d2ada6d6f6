"""What happens around every call of every service: request id, metrics, log line, and exceptions become statuses.

Servicers raise; this is the only place that talks to gRPC about errors.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from safelight.errors import (
    InternalError,
    InvalidRequestError,
    SafelightError,
    StageDrainingError,
    from_rpc_error,
    to_status,
)
from services.common.metrics import Metrics
from services.common.request_context import Context, request_id

_log = logging.getLogger("safelight.calls")
_QUIET_METHODS = ("/grpc.health.", "/grpc.reflection.")
# Gateways make these calls every second.
_PROBES = ("safelight.v1.LoadService/GetLoad", "safelight.v1.ModelService/ListModels")
# What a server that stops still does: hand out what it holds, say how it is, end work.
_OPEN_WHILE_DRAINING = (
    "safelight.v1.TensorExchangeService/",
    "safelight.v1.LoadService/",
    "safelight.v1.ModelService/",
    "safelight.v1.GenerationService/Cancel",
)
_CLOCK_TOLERANCE_SECONDS = 0.02

UnaryHandler = Callable[[Any, Context], Awaitable[Any]]
StreamHandler = Callable[[Any, Context], AsyncGenerator[Any, None]]


@dataclass
class _Call:
    """One call while it runs."""

    method: str
    started: float
    code: grpc.StatusCode = grpc.StatusCode.OK


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps unary and server-streaming handlers; health and reflection pass unwrapped."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining_service = ""

    def refuse_work(self, service: str) -> None:
        """From now on new work is refused with StageDrainingError: the service of that name stops."""
        self._draining_service = service

    async def idle(self) -> None:
        """Returns when no wrapped call is running."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_QUIET_METHODS):
            return handler
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(
            wrap(behaviour, method.removeprefix("/")),  # type: ignore[arg-type]  # the stubs know sync handlers only
            request_deserializer=_parser(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrap_unary(self, behaviour: UnaryHandler, method: str) -> UnaryHandler:
        async def handle(request: Any, context: Context) -> Any:
            with self._observed(method, request, context) as call:
                try:
                    self._check_open(method)
                    _check_readable(request)
                    return await behaviour(request, context)
                except Exception as error:
                    await _abort(call, context, error)

        return handle

    def _wrap_stream(self, behaviour: StreamHandler, method: str) -> StreamHandler:
        async def handle(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            with self._observed(method, request, context) as call:
                try:
                    self._check_open(method)
                    _check_readable(request)
                    async with aclosing(behaviour(request, context)) as responses:  # a cancelled call ends it now
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(call, context, error)

        return handle

    def _check_open(self, method: str) -> None:
        if self._draining_service and not method.startswith(_OPEN_WHILE_DRAINING):
            raise StageDrainingError(
                f"this {self._draining_service} is stopping and takes no new work: use another replica",
                stage=self._draining_service,
            )

    @contextmanager
    def _observed(self, method: str, request: Any, context: Context) -> Iterator[_Call]:
        """Counts and logs a call around its handler, whatever way it ends."""
        request_id.set(_id_of(request))
        call = _Call(method, time.monotonic())
        running = self._metrics.requests_running.labels(method)
        running.inc()
        self._running += 1
        self._idle.clear()
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            overdue = _is_overdue(context)
            call.code = grpc.StatusCode.DEADLINE_EXCEEDED if overdue else grpc.StatusCode.CANCELLED
            raise
        finally:
            running.dec()
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._record(call)

    def _record(self, call: _Call) -> None:
        seconds = time.monotonic() - call.started
        self._metrics.requests.labels(call.method, call.code.name).inc()
        self._metrics.request_seconds.labels(call.method).observe(seconds)
        log = _log.debug if call.method in _PROBES and call.code is grpc.StatusCode.OK else _log.info
        log("call ended", extra={"method": call.method, "code": call.code.name, "seconds": round(seconds, 4)})


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a request whose bytes are no message of its type."""

    reason: str


def _parser(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Parses requests without raising: what is raised there would leave as UNKNOWN, uncounted and unlogged."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize is not None else data
        except DecodeError as error:
            return _Unreadable(str(error))

    return parse


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidRequestError.of("request", f"can't be read ({request.reason}): use the stubs of safelight.v1")


def _is_overdue(context: Context) -> bool:
    """Whether the call's deadline has passed, by this side's clock or nearly: the caller's may have ended it first."""
    remaining = context.time_remaining()
    return remaining is not None and remaining <= _CLOCK_TOLERANCE_SECONDS


def _id_of(request: Any) -> str:
    """The request id that the message carries, or a new one."""
    work = getattr(request, "context", None)
    return getattr(work, "request_id", "") or uuid.uuid4().hex


async def _abort(call: _Call, context: Context, error: Exception) -> NoReturn:
    """End the call with the status of an exception; what is not ours is logged and leaves as INTERNAL."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = as_safelight_error(error)
    call.code = known.code
    log = _log.exception if known.code is grpc.StatusCode.INTERNAL else _log.info
    log("call failed: %s", known.message, extra={"method": call.method, "code": known.code.name})
    status = rpc_status.to_status(to_status(known))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)
    raise AssertionError("abort always raises")


def as_safelight_error(error: Exception) -> SafelightError:
    """The error as clients shall see it: ours unchanged, another service's translated, all else a neutral sentence."""
    if isinstance(error, SafelightError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return from_rpc_error(error)
    current = request_id.get()
    return InternalError(f"internal error; the server's log has it under request id {current}", request_id=current)
