"""Laws of the bootstrap: health, reflection and metrics tell the truth, and a server ends in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from safelight.errors import StageDrainingError, StageUnavailableError, UnsupportedError
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from services.common.channels import open_channel
from services.common.metrics import Metrics
from services.common.server import BindError, Server, Service
from services.common.settings import ServerSettings
from tests.serving import Serve, failure, unary

ROOT = Path(__file__).parents[3]
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


async def echo(request: EncodeRequest) -> EncodeResponse:
    return EncodeResponse(prompts=[EncodedPrompt(truncated_text=text) for text in request.prompts])


async def said(channel: grpc.aio.Channel, text: str) -> str:
    response = await EncoderServiceStub(channel).Encode(EncodeRequest(prompts=[text]))
    return response.prompts[0].truncated_text


# Health and reflection are called without their stubs, whose type hints know synchronous channels only.
async def health(channel: grpc.aio.Channel, name: str) -> HealthCheckResponse:
    check: grpc.aio.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse] = channel.unary_unary(
        "/grpc.health.v1.Health/Check", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
    )
    return await check(HealthCheckRequest(service=name))


class Watch:
    """A watch of a service's health."""

    def __init__(self, channel: grpc.aio.Channel, name: str = "") -> None:
        watch: grpc.aio.UnaryStreamMultiCallable[HealthCheckRequest, HealthCheckResponse] = channel.unary_stream(
            "/grpc.health.v1.Health/Watch", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        self._call = watch(HealthCheckRequest(service=name))

    async def next(self) -> int:
        """The next status."""
        return (await anext(aiter(self._call))).status

    def end(self) -> None:
        """Watch no longer."""
        self._call.cancel()


@pytest.mark.parametrize("name", ["", "safelight.v1.EncoderService", "encoder/demo", "encoder/majicflus"])
async def test_server_services_and_models_are_healthy_when_it_serves(serve: Serve, name: str) -> None:
    running = await serve(unary(echo, models=["demo", "majicflus"]))
    assert (await health(running.channel, name)).status == SERVING


async def test_a_model_that_is_not_served_has_no_health(serve: Serve) -> None:
    running = await serve(unary(echo, models=["demo"]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(running.channel, "encoder/sdxl")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["", "safelight.v1.EncoderService", "encoder/demo"])
async def test_those_who_watch_the_health_see_the_stop(serve: Serve, name: str) -> None:
    running = await serve(unary(echo, models=["demo"]), ServerSettings(drain_seconds=30.0))
    watch = Watch(running.channel, name)
    before = await watch.next()
    stopping = asyncio.create_task(running.server.stop())
    after = await watch.next()
    watch.end()
    await stopping
    assert [before, after] == [SERVING, NOT_SERVING]


async def test_a_running_call_ends_well_within_the_drain_time_and_new_ones_are_refused(serve: Serve) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(request: EncodeRequest) -> EncodeResponse:
        started.set()
        await release.wait()
        return await echo(request)

    running = await serve(unary(slow), ServerSettings(drain_seconds=30.0))
    watch = Watch(running.channel)
    await watch.next()
    call = asyncio.create_task(said(running.channel, "a cat"))
    await started.wait()
    stopping = asyncio.create_task(running.server.stop())
    await watch.next()
    watch.end()
    assert type(await failure(said(running.channel, "a dog"))) is StageDrainingError
    release.set()
    assert await call == "a cat"
    await stopping


async def test_who_watches_the_health_does_not_hold_the_stop_up(serve: Serve) -> None:
    running = await serve(unary(echo), ServerSettings(drain_seconds=60.0))
    watch = Watch(running.channel)
    await watch.next()
    await asyncio.wait_for(running.server.stop(), 10)


async def test_calls_that_outlast_the_drain_time_are_ended(serve: Serve) -> None:
    started = asyncio.Event()

    async def endless(request: EncodeRequest) -> EncodeResponse:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    running = await serve(unary(endless), ServerSettings(drain_seconds=0.2))
    call = asyncio.create_task(failure(said(running.channel, "a cat")))
    await started.wait()
    await running.server.stop()
    assert type(await call) is StageUnavailableError


async def test_what_others_may_still_fetch_is_kept_for_them_after_the_last_call(serve: Serve) -> None:
    events: list[str] = []
    begun, fetched = asyncio.Event(), asyncio.Event()

    async def until_fetched() -> None:
        events.append("kept")
        begun.set()
        await fetched.wait()

    async def close() -> None:
        events.append("closed")

    service = Service("encoder", {}, close=close, drain=lambda: events.append("drained"), until_fetched=until_fetched)
    running = await serve(service, ServerSettings(drain_seconds=30.0))
    stopping = asyncio.create_task(running.server.stop())
    await begun.wait()
    assert events == ["drained", "kept"]
    fetched.set()
    await stopping
    assert events == ["drained", "kept", "closed"]


async def test_what_nobody_fetches_is_kept_for_the_drain_time_only(serve: Serve) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    running = await serve(Service("encoder", {}, until_fetched=forever), ServerSettings(drain_seconds=0.2))
    await asyncio.wait_for(running.server.stop(), 10)


async def test_a_service_starts_with_its_address_and_closes_after_the_last_call(serve: Serve) -> None:
    events: list[str] = []

    async def start(address: str) -> None:
        events.append(f"start at {address}")

    async def close() -> None:
        events.append("close")

    running = await serve(Service("encoder", unary(echo).mounts, start=start, close=close))
    await said(running.channel, "a cat")
    await running.server.stop()
    assert events == [f"start at {running.server.address}", "close"]


async def test_other_services_are_told_the_advertised_address(serve: Serve) -> None:
    told: list[str] = []

    async def start(address: str) -> None:
        told.append(address)

    await serve(Service("encoder", {}, start=start), ServerSettings(advertise="encoder-0.safelight:7001"))
    assert told == ["encoder-0.safelight:7001"]


async def reflected(channel: grpc.aio.Channel) -> set[str]:
    """The services that reflection lists."""
    reflect: grpc.aio.StreamStreamMultiCallable[ServerReflectionRequest, ServerReflectionResponse] = (
        channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            ServerReflectionRequest.SerializeToString,
            ServerReflectionResponse.FromString,
        )
    )
    call = reflect(iter([ServerReflectionRequest(list_services="")]))
    return {service.name async for response in call for service in response.list_services_response.service}


async def test_reflection_lists_the_services(serve: Serve) -> None:
    running = await serve(unary(echo))
    listed = {"safelight.v1.EncoderService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert await reflected(running.channel) == listed


async def test_reflection_can_be_turned_off(serve: Serve) -> None:
    running = await serve(unary(echo), ServerSettings(reflection=False, drain_seconds=0.0))
    assert type(await failure(reflected(running.channel))) is UnsupportedError


async def test_metrics_over_http_count_the_calls(serve: Serve) -> None:
    running = await serve(unary(echo), ServerSettings(metrics_port=0, drain_seconds=0.0))
    for _ in range(3):
        await said(running.channel, "a cat")
    await health(running.channel, "")
    text = await asyncio.to_thread(fetch, f"http://127.0.0.1:{running.server.metrics_port}/metrics")
    counts = [line for line in text.splitlines() if line.startswith("safelight_requests_total")]
    assert counts == ['safelight_requests_total{code="OK",method="safelight.v1.EncoderService/Encode"} 3.0']


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


async def test_metrics_end_with_the_server(serve: Serve) -> None:
    running = await serve(unary(echo), ServerSettings(metrics_port=0))
    await running.server.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", running.server.metrics_port)


async def test_a_port_in_use_is_an_error_that_names_it(serve: Serve) -> None:
    first = await serve(unary(echo))
    with pytest.raises(BindError, match=f"listen: {first.server.address} is in use"):
        await serve(unary(echo), ServerSettings(listen=first.server.address))


async def test_a_metrics_port_in_use_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=f"metrics_port: 127.0.0.1:{port}: Address already in use"):
            await Server(unary(echo), ServerSettings(metrics_port=port), Metrics()).start()


@pytest.mark.parametrize("scheme", ["unix:", "unix://"])
async def test_a_server_listens_on_a_unix_socket(serve: Serve, tmp_path: Path, scheme: str) -> None:
    running = await serve(unary(echo), ServerSettings(listen=f"{scheme}{tmp_path}/encoder.sock", drain_seconds=0.0))
    assert running.server.address == f"{scheme}{tmp_path}/encoder.sock"
    assert await said(running.channel, "a cat") == "a cat"


PROGRAM = """
import asyncio, sys
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.settings import ServerSettings
from services.common.stage import run_server

class Settings(ServerSettings):
    service = "toy"

class EchoAfterALineOnStdin(EncoderServiceServicer):
    async def Encode(self, request, context):
        print("started", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return EncodeResponse(prompts=[EncodedPrompt(truncated_text=text) for text in request.prompts])

def mount(server):
    add_EncoderServiceServicer_to_server(EchoAfterALineOnStdin(), server)

run_server(Settings, lambda settings: (Service("toy", {"safelight.v1.EncoderService": mount}), Metrics()))
"""


@asynccontextmanager
async def program(tmp_path: Path, *flags: str) -> AsyncIterator[Process]:
    """The program above in a process of its own."""
    script = tmp_path / "toy.py"
    script.write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT), str(ROOT / "clients/python")])
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), *flags, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def logged(process: Process, message: str) -> dict[str, str]:
    """The next log line with that message."""
    assert process.stderr is not None
    async for line in process.stderr:
        entry: dict[str, str] = json.loads(line)
        if entry["message"] == message:
            return entry
    raise AssertionError(f"the program ended without {message!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_call_end_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    async with program(tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = (await logged(process, "serving"))["address"]
        async with open_channel(address) as channel:
            watch = Watch(channel)
            await watch.next()
            call = asyncio.create_task(said(channel, "a cat"))
            await process.stdout.readline()
            process.send_signal(number)
            assert await watch.next() == NOT_SERVING
            watch.end()
            process.stdin.write(b"\n")
            assert await call == "a cat"
        assert (await logged(process, "stopped"))["service"] == "toy"
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--log-level", "loud", "toy: log_level: 'loud' is not one of debug, info, warning, error\n"),
        ("--listen", "192.0.2.1:1", "toy: listen: 192.0.2.1:1 is in use, or is no address of this machine\n"),
    ],
)
async def test_a_bad_setting_ends_the_start_with_2_and_a_sentence(
    tmp_path: Path, flag: str, value: str, sentence: str
) -> None:
    async with program(tmp_path, flag, value) as process:
        _, errors = await process.communicate()
        assert errors.decode().endswith(sentence)
        assert "Traceback" not in errors.decode()
        assert process.returncode == 2
