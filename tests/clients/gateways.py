"""Gateways of a few lines: what they answer is a list, what they were asked is another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from safelight.errors import SafelightError
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2 as work
from safelight.v1.generation_service_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.server import Server, Service
from services.common.settings import ServerSettings

Answer = Callable[[pb.GenerateRequest, Context], AsyncGenerator[pb.GenerateResponse, None]]


class FakeGateway(GenerationServiceServicer):
    """Gives one answer after the other, the last one again and again, and notes what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled: list[work.WorkContext] = []
        self.left = asyncio.Event()
        """Set when a call ended before its answer."""

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
        try:
            async with aclosing(answer(request, context)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self.cancelled.append(request.context)
        return pb.CancelResponse()


@asynccontextmanager
async def serving(gateway: FakeGateway, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The address of a server for the gateway, which cuts its calls when it stops."""
    name = "safelight.v1.GenerationService"
    service = Service("gateway", {name: lambda server: add_GenerationServiceServicer_to_server(gateway, server)})
    server = Server(service, ServerSettings(listen=listen, drain_seconds=0.0), Metrics())
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop()


def story(
    *, seed: int = 5, steps: int = 3, file: bytes = b"abcdef", preview: bytes | None = None
) -> list[pb.GenerateResponse]:
    """A whole request: accepted, the steps, a preview where one is given, the file in two pieces, the result."""
    parameters = work.GenerationParameters(prompt="a cat", model="tiny", seed=seed, width=8, height=8)
    half = len(file) // 2
    progress = [pb.GenerateProgress(stage="denoiser", step=step + 1, steps=steps) for step in range(steps)]
    previews = [] if preview is None else [pb.GeneratePreview(step=steps, data=preview, media_type="image/png")]
    return numbered(
        pb.GenerateResponse(accepted=pb.GenerateAccepted(request_id="id", images=[parameters])),
        *(pb.GenerateResponse(progress=each) for each in progress),
        *(pb.GenerateResponse(preview=each) for each in previews),
        pb.GenerateResponse(chunk=work.FileChunk(data=file[:half], media_type="image/png")),
        pb.GenerateResponse(chunk=work.FileChunk(data=file[half:], offset=half)),
        pb.GenerateResponse(result=pb.GenerateResult(images=[pb.ImageReceipt(parameters=parameters)])),
    )


def numbered(*events: pb.GenerateResponse) -> list[pb.GenerateResponse]:
    """The events with their numbers, from 1."""
    for number, event in enumerate(events, 1):
        event.sequence = number
    return list(events)


def tells(events: Sequence[pb.GenerateResponse]) -> Answer:
    """An answer that keeps to `after_sequence`."""

    async def answer(request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        for event in events[request.after_sequence :]:
            yield event

    return answer


def cut(events: Sequence[pb.GenerateResponse], after: int, code: object) -> Answer:
    """An answer whose connection breaks, with a bare gRPC status, when `after` events in all have been told."""

    async def answer(request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        for event in events[request.after_sequence : after]:
            yield event
        await context.abort(code, "cut")  # type: ignore[arg-type]

    return answer


def stays_after(events: Sequence[pb.GenerateResponse]) -> Answer:
    """An answer that tells its events and then goes on for ever."""

    async def answer(request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        for event in events:
            yield event
        await asyncio.Event().wait()

    return answer


def refuses(error: SafelightError) -> Answer:
    """An answer that is an error."""

    async def answer(request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        raise error
        yield

    return answer
