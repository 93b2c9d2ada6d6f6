"""Laws of every call: exceptions become statuses, all ends are counted, and log lines carry the request id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import pytest

from safelight.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnknownModelError,
)
from safelight.v1.denoiser_service_pb2 import DenoiseProgress, DenoiseRequest, DenoiseResponse
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from safelight.v1.work_pb2 import WorkContext
from services.common.request_context import request_id
from tests.serving import DENOISE, ENCODE, Running, Serve, failing, failure, streaming, unary

WORK = WorkContext(request_id="6f1c")
STEP = DenoiseResponse(sequence=1, progress=DenoiseProgress(step=1, steps=2))


async def encode_nothing(request: EncodeRequest) -> EncodeResponse:
    return EncodeResponse()


async def ended(running: Running, method: str, code: str) -> None:
    """Waits until a call of the method has been counted under the code, once."""
    labels = {"method": method, "code": code}
    while running.server.metrics.registry.get_sample_value("safelight_requests_total", labels) is None:  # noqa: ASYNC110  # nothing tells
        await asyncio.sleep(0)
    assert running.server.metrics.registry.get_sample_value("safelight_requests_total", labels) == 1


def still_running(running: Running, method: str) -> float | None:
    return running.server.metrics.registry.get_sample_value("safelight_requests_running", {"method": method})


async def test_a_call_that_succeeds_is_counted_timed_and_no_longer_running(serve: Serve) -> None:
    running = await serve(unary(encode_nothing))
    await EncoderServiceStub(running.channel).Encode(EncodeRequest())
    await ended(running, ENCODE, "OK")
    assert still_running(running, ENCODE) == 0
    assert running.server.metrics.registry.get_sample_value("safelight_request_seconds_count", {"method": ENCODE}) == 1


async def test_an_error_of_ours_is_counted_under_its_code(serve: Serve) -> None:
    running = await serve(failing(OverloadedError("the queue is full")))
    await failure(EncoderServiceStub(running.channel).Encode(EncodeRequest()))
    await ended(running, ENCODE, "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("call", ["unary_unary", "unary_stream"])
async def test_bytes_that_are_no_message_are_an_invalid_request(serve: Serve, call: str) -> None:
    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        yield STEP

    unary_call = call == "unary_unary"
    running = await serve(unary(encode_nothing) if unary_call else streaming(denoise))
    method = ENCODE if unary_call else DENOISE
    answer = getattr(running.channel, call)(f"/{method}")(b"\xff\xff")
    error = await failure(answer if unary_call else answer.read())
    assert type(error) is InvalidRequestError
    assert [violation.field for violation in error.violations] == ["request"]
    await ended(running, method, "INVALID_ARGUMENT")


async def test_an_unknown_exception_leaves_as_a_neutral_sentence_with_the_request_id(serve: Serve) -> None:
    running = await serve(failing(KeyError("/secret/path")))
    error = await failure(EncoderServiceStub(running.channel).Encode(EncodeRequest(context=WORK)))
    assert type(error) is InternalError
    assert str(error) == "internal error; the server's log has it under request id 6f1c"
    assert error.metadata == {"request_id": "6f1c"}
    await ended(running, ENCODE, "INTERNAL")


async def test_the_log_has_the_traceback_of_an_unknown_exception(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = await serve(failing(KeyError("/secret/path")))
    await failure(EncoderServiceStub(running.channel).Encode(EncodeRequest(context=WORK)))
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


async def test_an_error_of_another_service_passes_on_as_it_is(serve: Serve) -> None:
    behind = await serve(failing(UnknownModelError("no such model", model="sdxl")))

    async def forward(request: EncodeRequest) -> EncodeResponse:
        return await EncoderServiceStub(behind.channel).Encode(request)

    front = await serve(unary(forward))
    error = await failure(EncoderServiceStub(front.channel).Encode(EncodeRequest()))
    assert (type(error), str(error), error.metadata) == (UnknownModelError, "no such model", {"model": "sdxl"})


@pytest.mark.parametrize("messages", [0, 1, 3])
async def test_a_stream_fails_with_the_error_after_the_messages_before_it(serve: Serve, messages: int) -> None:
    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        for _ in range(messages):
            yield STEP
        raise UnknownModelError("no such model")

    running = await serve(streaming(denoise))
    stream = DenoiserServiceStub(running.channel).Denoise(DenoiseRequest())
    assert [await stream.read() for _ in range(messages)] == [STEP] * messages
    assert type(await failure(stream.read())) is UnknownModelError
    await ended(running, DENOISE, "NOT_FOUND")


async def test_an_unknown_exception_in_a_stream_is_internal(serve: Serve) -> None:
    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        yield STEP
        raise ZeroDivisionError

    running = await serve(streaming(denoise))
    stream = DenoiserServiceStub(running.channel).Denoise(DenoiseRequest(context=WORK))
    await stream.read()
    error = await failure(stream.read())
    assert (type(error), error.metadata) == (InternalError, {"request_id": "6f1c"})


async def test_a_cancelled_call_cancels_its_handler_and_is_counted(serve: Serve) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def encode(request: EncodeRequest) -> EncodeResponse:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    running = await serve(unary(encode))
    call = EncoderServiceStub(running.channel).Encode(EncodeRequest())
    await started.wait()
    call.cancel()
    await cancelled.wait()
    await ended(running, ENCODE, "CANCELLED")
    assert still_running(running, ENCODE) == 0


async def test_a_cancelled_stream_ends_its_handler_while_it_waits(serve: Serve) -> None:
    ended_by: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        yield STEP
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            ended_by.set_result(error)
            raise

    running = await serve(streaming(denoise))
    stream = DenoiserServiceStub(running.channel).Denoise(DenoiseRequest())
    await stream.read()
    stream.cancel()
    assert isinstance(await ended_by, asyncio.CancelledError)
    await ended(running, DENOISE, "CANCELLED")


async def test_a_cancelled_stream_ends_a_handler_that_only_yields_before_the_call_is_over(serve: Serve) -> None:
    """The cancellation meets it at a `yield`, where no exception reaches it of itself."""
    closed: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()

    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        try:
            while True:
                yield STEP
        finally:
            closed.set_result(still_running(running, DENOISE))

    running = await serve(streaming(denoise))
    stream = DenoiserServiceStub(running.channel).Denoise(DenoiseRequest())
    await stream.read()
    stream.cancel()
    assert await closed == 1
    await ended(running, DENOISE, "CANCELLED")


async def test_a_deadline_stops_the_handler_and_is_counted_as_such(serve: Serve) -> None:
    cancelled = asyncio.Event()

    async def encode(request: EncodeRequest) -> EncodeResponse:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    running = await serve(unary(encode))
    error = await failure(EncoderServiceStub(running.channel).Encode(EncodeRequest(), timeout=0.05))
    await cancelled.wait()
    assert type(error) is DeadlineExceededError
    await ended(running, ENCODE, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("given", ["6f1c", ""])
async def test_the_handler_runs_under_the_request_id_of_the_message_or_a_new_one(serve: Serve, given: str) -> None:
    seen: list[str] = []

    async def encode(request: EncodeRequest) -> EncodeResponse:
        seen.append(request_id.get())
        return EncodeResponse()

    running = await serve(unary(encode))
    for _ in range(2):
        await EncoderServiceStub(running.channel).Encode(EncodeRequest(context=WorkContext(request_id=given)))
    assert all(seen)
    assert set(seen) == {"6f1c"} if given else len(set(seen)) == 2
