"""The life of one generation request: check, admit, make every picture, stream what happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from gateway.admission import Admission
from gateway.catalog import Stages
from gateway.credits import Credits
from gateway.leases import Leases
from gateway.picture import Picture
from gateway.plan import GenerationPlan, make_plan
from gateway.prompt_encoding import PromptEncoding
from gateway.settings import GatewaySettings
from gateway.stage_calls import StageCalls
from gateway.validation import check_generate
from safelight.errors import DeadlineExceededError
from safelight.v1.generation_service_pb2 import GenerateAccepted, GenerateRequest, GenerateResponse, GenerateResult
from services.common.channels import ChannelPool
from services.common.metrics import Metrics
from services.common.request_context import request_id

# Events that may wait for a slow client before its pictures wait too.
_EVENT_BUFFER = 64

EventQueue = asyncio.Queue[GenerateResponse | Exception]


@dataclass
class Generation:
    """Runs requests against the stages."""

    stages: Stages
    channels: ChannelPool
    settings: GatewaySettings
    metrics: Metrics
    admission: Admission
    credits: Credits
    _releases: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(
        self, request: GenerateRequest, remaining_seconds: float | None
    ) -> AsyncGenerator[GenerateResponse, None]:
        """Everything that happens to a request, in order. Closing the iterator stops its work within one step.

        Args:
            request: what to make.
            remaining_seconds: time left to the call; None: no limit.

        Raises:
            SafelightError: of the kinds that GenerationService.Generate documents.
        """
        model = self.stages.find(request.model)
        check_generate(request, model)
        asked = make_plan(request, model)
        request_id.set(asked.request_id)
        deadline = _deadline(asked, remaining_seconds)
        with self.admission.admit(asked, None if deadline is None else deadline - time.monotonic()) as admitted:
            plan, calls = admitted.plan, StageCalls(self.stages, deadline, admitted.given)
            accepted = GenerateAccepted(
                request_id=plan.request_id, images=plan.images, estimated_seconds=admitted.estimated_seconds
            )
            yield GenerateResponse(accepted=accepted)
            async with aclosing(self._make_pictures(plan, calls)) as events:
                async for event in events:
                    yield event

    async def _make_pictures(self, plan: GenerationPlan, calls: StageCalls) -> AsyncGenerator[GenerateResponse, None]:
        events: EventQueue = asyncio.Queue(_EVENT_BUFFER)
        leases = Leases(self.channels)
        task = asyncio.create_task(_run(self._pictures(plan, calls, leases, events), events))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.HasField("result"):
                    return
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._release(leases)

    def _pictures(
        self, plan: GenerationPlan, calls: StageCalls, leases: Leases, events: EventQueue
    ) -> Sequence[Picture]:
        attempts = self.settings.max_attempts
        encoding = PromptEncoding(plan, calls, leases, self.metrics, attempts, self.settings.encode_seconds)
        return [
            Picture(plan, index, encoding, calls, self.credits, leases, events.put, self.metrics, attempts)
            for index in range(len(plan.images))
        ]

    def _release(self, leases: Leases) -> None:
        """Acknowledge a request's leases without holding up its end."""
        task = asyncio.create_task(leases.release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


async def _run(pictures: Sequence[Picture], events: EventQueue) -> None:
    """Make all pictures at once; the result, or what went wrong with the first that failed, is the last event."""
    tasks = [asyncio.create_task(picture.make()) for picture in pictures]
    try:
        receipts = await asyncio.gather(*tasks)
    except Exception as error:  # handed to the stream, which raises it
        await events.put(error)
    else:
        result = GenerateResult(images=receipts)
        result.completed_at.GetCurrentTime()
        await events.put(GenerateResponse(result=result))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _deadline(plan: GenerationPlan, remaining_seconds: float | None) -> float | None:
    """The earlier of the call's deadline and the work's own, as `time.monotonic()`.

    Raises:
        DeadlineExceededError: the work's own has passed.
    """
    limits = [] if remaining_seconds is None else [remaining_seconds]
    if plan.context.HasField("deadline"):
        limits.append(plan.context.deadline.ToNanoseconds() / 1e9 - time.time())
    if not limits:
        return None
    if min(limits) <= 0:
        raise DeadlineExceededError("context.deadline has passed already; give a later one")
    return time.monotonic() + min(limits)
