"""The life of one generation request: check, admit, make every picture, tell what happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.adapters import Adapters
from gateway.admission import Admission
from gateway.admitted import Admitted
from gateway.catalog import Stages
from gateway.checkpoints import Checkpoints
from gateway.credits import Credits
from gateway.input_encoding import EncodedInputs, InputEncoding
from gateway.inputs import with_measures_of_inputs
from gateway.leases import Leases
from gateway.ledger import Ledger
from gateway.picture import Picture
from gateway.plan import GenerationPlan, make_plan
from gateway.report import Emit, Report
from gateway.settings import GatewaySettings
from gateway.shared import Shared
from gateway.stage_calls import StageCalls
from gateway.tasks import ending
from gateway.validation import check_generate
from safelight.errors import DeadlineExceededError, FingerprintMismatchError
from safelight.v1.generation_service_pb2 import (
    GenerateAccepted,
    GenerateRequest,
    GenerateResponse,
    GenerateResult,
    ImageReceipt,
)
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import WorkContext
from services.common.exchange import TensorReader, TensorStore
from services.common.metrics import Metrics
from services.common.request_context import request_id

_LAST_TIMESTAMP = 253_402_300_799  # of the year 9999; a call's deadline may be further away


@dataclass
class Generation:
    """Runs requests against the stages.

    Args:
        stages: the replicas.
        reader: fetches checkpoints.
        store: hands them out.
        leases: tells the stages which tensors are done with.
        settings: the gateway's.
        metrics: the gateway's.
        admission: lets requests in, or refuses them.
        credits: bound the pictures that are in the stages at once.
        adapters: stay loaded while a request uses them.
    """

    stages: Stages
    reader: TensorReader
    store: TensorStore
    leases: Leases
    settings: GatewaySettings
    metrics: Metrics
    admission: Admission
    credits: Credits
    adapters: Adapters

    async def run(self, request: GenerateRequest, remaining_seconds: float | None, emit: Emit) -> None:
        """Make what a request asks for. Cancelling it stops its work within one step.

        Args:
            request: what to make, with a request id.
            remaining_seconds: time left to it beside its own deadline; None: no limit.
            emit: takes everything that happens to it, in order; the last is its result.

        Raises:
            SafelightError: of the kinds that GenerationService.Generate documents.
        """
        request_id.set(request.context.request_id)
        model = self.stages.find(request.model)
        check_generate(request, model)
        with self.admission.hold_inputs(sum(given.ByteSize() for given in request.inputs)):
            receipts = await self._make_all(request, model, remaining_seconds, emit)
        result = GenerateResult(images=receipts)
        result.completed_at.GetCurrentTime()
        emit(GenerateResponse(result=result))

    async def _make_all(
        self, request: GenerateRequest, model: ModelDescription, remaining_seconds: float | None, emit: Emit
    ) -> Sequence[ImageReceipt]:
        """The receipts of all pictures of a checked request."""
        asked = await asyncio.to_thread(self._plan, request, model) if request.inputs else make_plan(request, model)
        seconds = _remaining_seconds(asked.context, remaining_seconds)
        with self.adapters.used(model.name, request.adapters), self.admission.admit(asked, seconds) as admitted:
            calls = StageCalls(self.stages, self.settings, _set_deadline(asked.context, seconds), admitted.given)
            emit(_accepted(admitted))
            return await self._follow_plan(request, admitted.plan, calls, emit)

    def _plan(self, request: GenerateRequest, model: ModelDescription) -> GenerationPlan:
        """The plan of a request with inputs, which are measured and digested."""
        return make_plan(with_measures_of_inputs(request, model, self.settings.max_film_bytes), model)

    async def _follow_plan(
        self, request: GenerateRequest, plan: GenerationPlan, calls: StageCalls, emit: Emit
    ) -> Sequence[ImageReceipt]:
        """Make all pictures; if their weights are being replaced, with the new ones, unless a file has been begun."""
        reports = [Report(index, emit, self.metrics) for index in range(len(plan.images))]
        ledgers = [Ledger(self.metrics) for _ in reports]
        while True:
            try:
                return await self._make(plan, calls, reports, ledgers)
            except FingerprintMismatchError:
                renewed = plan.with_model(self.stages.find(plan.model.name))
                if renewed.fingerprints == plan.fingerprints or any(report.sent_bytes for report in reports):
                    raise
                check_generate(request, renewed.model)
                plan = renewed

    async def _make(
        self, plan: GenerationPlan, calls: StageCalls, reports: Sequence[Report], ledgers: Sequence[Ledger]
    ) -> Sequence[ImageReceipt]:
        """All pictures at once; the first that fails ends the others."""
        encoding = InputEncoding(plan, calls, self.metrics, self.settings.max_attempts)
        inputs = Shared(encoding.encode)
        tasks = [
            asyncio.create_task(self._make_one(plan, inputs, calls, report, ledger))
            for report, ledger in zip(reports, ledgers, strict=True)
        ]
        try:
            async with ending(*tasks):
                return await asyncio.gather(*tasks)
        finally:
            self.leases.release(encoding.refs)

    async def _make_one(
        self,
        plan: GenerationPlan,
        inputs: Shared[EncodedInputs],
        calls: StageCalls,
        report: Report,
        ledger: Ledger,
    ) -> ImageReceipt:
        """One picture; whatever way it ends, nothing of it is left at a stage or here."""
        checkpoints = Checkpoints(self.reader, self.store, self.leases, self.metrics)
        picture = Picture(
            plan,
            report.index,
            inputs,
            calls,
            self.credits,
            checkpoints,
            ledger,
            report,
            self.settings,
            self.metrics,
        )
        try:
            return await picture.make()
        finally:
            checkpoints.close()
            self.leases.release(picture.refs)


def _accepted(admitted: Admitted) -> GenerateResponse:
    plan = admitted.plan
    accepted = GenerateAccepted(
        request_id=plan.context.request_id, images=plan.images, estimated_seconds=admitted.estimated_seconds
    )
    return GenerateResponse(accepted=accepted)


def _remaining_seconds(context: WorkContext, call_seconds: float | None) -> float | None:
    """Time until the earlier of the call's deadline and the work's own; None: it has neither.

    Raises:
        DeadlineExceededError: the work's own has passed.
    """
    limits = [] if call_seconds is None else [call_seconds]
    if context.HasField("deadline"):
        limits.append(context.deadline.ToNanoseconds() / 1e9 - time.time())
    if limits and min(limits) <= 0:
        raise DeadlineExceededError("context.deadline has passed already; give a later one")
    return min(limits, default=None)


def _set_deadline(context: WorkContext, seconds: float | None) -> float | None:
    """Tell the stages of the deadline; returns it as `time.monotonic()`."""
    if seconds is None:
        return None
    moment = min(time.time() + seconds, _LAST_TIMESTAMP)
    context.deadline.FromNanoseconds(int(moment * 1e9))
    return time.monotonic() + seconds
