"""The bootstrap of every server: gRPC with health, reflection, metrics and a clean end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.availability import Availability
from services.common.channels import MAX_MESSAGE_BYTES
from services.common.interceptors import CallInterceptor
from services.common.metrics import Metrics
from services.common.settings import ServerSettings

_log = logging.getLogger("safelight.server")

_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the same port fails instead of sharing it
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),  # a peer that has starved sends its late pings at once
)


class BindError(Exception):
    """An address can't be listened on; the message names it and its setting."""


@dataclass(frozen=True)
class Service:
    """What a stage or the gateway hands to the bootstrap.

    Args:
        name: "encoder", "denoiser", "decoder" or "gateway".
        mounts: adds each gRPC service, by its full name.
        models: names of the models served; each has a health status of its own, "<name of service>/<model>".
        start: begins background work on the server's event loop; gets the address that other services reach it at.
        close: ends it.
        drain: hands running work back that can go on elsewhere; the server has begun to stop.
        until_fetched: returns when nothing is left that others may still fetch.
        availability: tells when a model can't be computed for a while.
    """

    name: str
    mounts: dict[str, Callable[[grpc.aio.Server], None]]
    models: Sequence[str] = ()
    start: Callable[[str], Awaitable[None]] | None = None
    close: Callable[[], Awaitable[None]] | None = None
    drain: Callable[[], None] | None = None
    until_fetched: Callable[[], Awaitable[None]] | None = None
    availability: Availability | None = None


_FLUSH_SECONDS = 0.5


@dataclass
class Server:
    """One running gRPC server."""

    service: Service
    settings: ServerSettings
    metrics: Metrics
    address: str = ""
    metrics_port: int = -1
    _grpc: grpc.aio.Server = field(init=False)
    _calls: CallInterceptor = field(init=False)
    _health: health.aio.HealthServicer = field(init=False)
    _reports: set[asyncio.Future[None]] = field(default_factory=set)

    async def start(self) -> None:
        """Bind, mount everything, report healthy.

        Raises:
            BindError: an address can't be listened on.
        """
        self._calls = CallInterceptor(self.metrics)
        limit = ("grpc.max_receive_message_length", self.settings.max_message_bytes)
        self._grpc = grpc.aio.server(interceptors=[self._calls], options=(*_SERVER_OPTIONS, limit))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        for mount in self.service.mounts.values():
            mount(self._grpc)
        if self.settings.reflection:
            names = (*self.service.mounts, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self._bind()
        if self.service.availability is not None:
            self.service.availability.listen(self._model_changed)
            self.service.availability.start()
        if self.service.start is not None:
            await self.service.start(self.settings.advertise or self.address)
        await self._grpc.start()
        await self._report_healthy()
        _log.info("serving", extra={"address": self.address, "metrics_port": self.metrics_port})

    def _bind(self) -> None:
        listen, host, port = self.settings.listen, self.settings.metrics_host, self.settings.metrics_port
        try:
            self.address = _bound_address(listen, self._grpc.add_insecure_port(listen))
        except RuntimeError as error:
            raise BindError(f"listen: {listen} is in use, or is no address of this machine") from error
        if port < 0:
            return
        try:
            self.metrics_port = self.metrics.serve(host, port)
        except OSError as error:
            raise BindError(f"metrics_host, metrics_port: {host}:{port}: {error.strerror}") from error

    async def _report_healthy(self) -> None:
        for name in ("", *self.service.mounts):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        availability = self.service.availability
        for model in self.service.models:
            await self._report_model(model, availability is None or model not in availability.away)

    async def _report_model(self, model: str, is_there: bool) -> None:
        """The health of one model; that of the server stays what it is."""
        status = health_pb2.HealthCheckResponse.SERVING if is_there else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(f"{self.service.name}/{model}", status)

    def _model_changed(self, model: str, is_there: bool) -> None:
        report = asyncio.ensure_future(self._report_model(model, is_there))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def stop(self) -> None:
        """Report unhealthy, take no new work, let running calls end within the drain time, then close.

        Within that time also what others may still fetch is kept for them, until it is fetched.
        """
        await self._health.enter_graceful_shutdown()
        await self._drain()
        if self.service.close is not None:
            await self.service.close()
        await asyncio.to_thread(self.metrics.close)
        _log.info("stopped", extra={"address": self.address})

    async def _drain(self) -> None:
        """gRPC alone would refuse those who come to fetch, and wait for those who watch the health, who never end."""
        self._calls.refuse_work(self.service.name)
        if self.settings.drain_seconds > 0 and self.service.drain is not None:
            self.service.drain()
        quiet = asyncio.ensure_future(self._until_quiet())
        await asyncio.wait((quiet,), timeout=self.settings.drain_seconds)
        in_time = not quiet.cancel()
        await self._grpc.stop(_FLUSH_SECONDS if in_time else None)  # the last answers may still be on their way

    async def _until_quiet(self) -> None:
        """Returns when no call runs and nothing is left to fetch."""
        await self._calls.idle()
        if self.service.until_fetched is not None:
            await self.service.until_fetched()
            await self._calls.idle()


def _bound_address(listen: str, port: int) -> str:
    """The listen address with the port that was bound."""
    if listen.startswith(("unix:", "unix-abstract:")):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def stop_signal() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
