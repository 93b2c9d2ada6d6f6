"""Laws of admission: what can't be done in time, or would wait too long, is refused at once, with a time to return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from gateway.admission import Admission
from gateway.admitted import Admitted
from gateway.catalog import Stages
from gateway.plan import GenerationPlan, make_plan
from gateway.replicas import ReplicaSet
from gateway.settings import GatewaySettings
from safelight.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    InvalidRequestError,
    OverloadedError,
)
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.load_service_pb2 import GetLoadResponse, WorkCost
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription, ModelDescription
from safelight.v1.work_pb2 import OUTPUT_FORMAT_PNG, GuidanceOptions, SamplingOptions
from services.common.channels import ChannelPool
from services.common.exchange import TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve

SHAPE = [4, 8, 8]
MODEL = ModelDescription(
    name="tiny",
    encoder=EncoderDescription(default_clip_skip=1),
    denoiser=DenoiserDescription(
        latent_channels=4,
        samplers=["euler"],
        schedules=["karras"],
        default_steps=10,
        default_latent_width=8,
        default_latent_height=8,
    ),
    decoder=DecoderDescription(scale_factor=8, formats=[OUTPUT_FORMAT_PNG]),
)


@dataclass(frozen=True)
class Gate:
    """An admission in front of stages that only tell their load."""

    admission: Admission
    stages: Stages
    metrics: Metrics

    def count(self, metric: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(metric, labels)

    def admit(self, asked: GenerationPlan, remaining_seconds: float | None) -> AbstractContextManager[Admitted]:
        return self.admission.admit(asked, remaining_seconds)

    def end(self, error: BaseException, stage: str, remaining_seconds: float) -> None:
        """A request that is let in, reaches a stage, and ends with an error."""
        with pytest.raises(type(error)), self.admit(plan(), remaining_seconds) as admitted:
            _raise_at(admitted, stage, error)


def _same(load: GetLoadResponse) -> GetLoadResponse:
    return load


def _raise_at(admitted: Admitted, stage: str, error: BaseException) -> None:
    admitted.given(stage)
    raise error


class OpenGate:
    """Builds gates; everything is closed when the test ends."""

    def __init__(self, serve: Serve, channels: ChannelPool) -> None:
        self._serve = serve
        self._channels = channels

    async def __call__(self, loads: Mapping[str, GetLoadResponse], **settings: Any) -> Gate:
        metrics = Metrics()
        replicas = {}
        for stage in ("encoder", "denoiser", "decoder"):
            load = loads.get(stage, GetLoadResponse())
            mounts = stage_mounts(TensorStore(60.0, Metrics()), [MODEL], partial(_same, load))
            address = (await self._serve(Service(stage, mounts, ("tiny",)))).server.address
            replicas[stage] = ReplicaSet(stage, (address,), 60.0, self._channels, metrics)
            await replicas[stage].refresh()
        stages = Stages(**replicas)
        return Gate(Admission(stages, GatewaySettings(**settings), metrics), stages, metrics)


@pytest.fixture
async def open_gate(serve: Serve) -> AsyncIterator[OpenGate]:
    channels = ChannelPool()
    yield OpenGate(serve, channels)
    await channels.close()


def load(each: float, backlog: float = 0.0, running: int = 0) -> GetLoadResponse:
    """A stage to which one row of a pass is so many seconds of work."""
    cost = WorkCost(model="tiny", latent_shape=SHAPE, rows=1, seconds=each)
    return GetLoadResponse(backlog_seconds=backlog, running=running, costs=[cost])


def plan(steps: int = 10, images: int = 1, min_steps: int = 0) -> GenerationPlan:
    request = GenerateRequest(
        model="tiny",
        prompt="a cat",
        num_images=images,
        sampling=SamplingOptions(steps=steps, min_steps=min_steps),
        guidance=GuidanceOptions(scale=1.0),
    )
    return make_plan(request, MODEL)


async def test_the_estimate_is_told_and_nothing_measured_is_no_estimate(open_gate: OpenGate) -> None:
    known = await open_gate({"denoiser": load(0.5), "decoder": load(2.0)})
    with known.admit(plan(), None) as admitted:
        assert admitted.estimated_seconds == pytest.approx(7.0)
    unknown = await open_gate({})
    with unknown.admit(plan(), 0.001) as admitted:
        assert admitted.estimated_seconds == 0


async def test_what_cannot_meet_its_deadline_is_refused_with_the_estimate(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0)})
    with pytest.raises(DeadlineUnreachableError, match=r"about 10\.0 s and has 4\.0 s: allow more time") as caught:
        gate.admit(plan(), 4.0).__enter__()
    assert caught.value.metadata == {"estimated_seconds": "10.000", "remaining_seconds": "4.000"}
    assert caught.value.retry_after_seconds is None
    assert gate.count("safelight_admission_refused_total", reason="deadline") == 1


async def test_a_deadline_that_an_idle_system_would_meet_gets_a_time_to_come_back(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0, backlog=100.0, running=50)})
    with pytest.raises(DeadlineUnreachableError) as caught:
        gate.admit(plan(), 20.0).__enter__()
    assert caught.value.retry_after_seconds == pytest.approx(90.0, abs=5.0)


async def test_fewer_steps_are_run_rather_than_a_refusal_where_the_request_allows_it(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0)})
    with gate.admit(plan(steps=10, images=2, min_steps=2), 12.5) as admitted:
        lowered = admitted.plan
        assert admitted.estimated_seconds == pytest.approx(10.0)
    assert [image.sampling.steps for image in lowered.images] == [5, 5]
    assert lowered.steps_saved == 5
    with gate.admit(plan(steps=10, min_steps=2), 12.5) as admitted:
        assert (admitted.plan.images[0].sampling.steps, admitted.plan.steps_saved) == (10, 0)
    with gate.admit(plan(steps=10, min_steps=8), 8.1) as admitted:
        assert admitted.plan.images[0].sampling.steps == 8
    with pytest.raises(DeadlineUnreachableError, match=r"about 8\.0 s"):
        gate.admit(plan(steps=10, min_steps=8), 6.0).__enter__()


async def test_under_overload_fewer_steps_fit_where_the_request_allows_it(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0, backlog=70.0, running=20)}, max_queue_seconds=100.0)
    with pytest.raises(OverloadedError):
        gate.admit(plan(steps=40), None).__enter__()
    with gate.admit(plan(steps=40, min_steps=10), None) as admitted:
        assert 28 <= admitted.plan.images[0].sampling.steps <= 32


@pytest.mark.parametrize("stage", ["denoiser", "decoder"])
async def test_a_stage_with_too_much_to_do_is_named_with_a_time_to_come_back(open_gate: OpenGate, stage: str) -> None:
    loads = {"denoiser": load(0.1), "decoder": load(0.1), stage: load(0.1, backlog=500.0, running=99)}
    gate = await open_gate(loads, max_queue_seconds=100.0)
    with pytest.raises(OverloadedError, match=f"the {stage} has") as caught:
        gate.admit(plan(), None).__enter__()
    assert caught.value.metadata["stage"] == stage
    assert caught.value.retry_after_seconds == pytest.approx(400.0, abs=5.0)
    assert gate.count("safelight_admission_refused_total", reason="overload") == 1


async def test_requests_that_were_let_in_a_moment_ago_are_ahead_of_the_next(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0)}, max_queue_seconds=25.0)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(gate.admit(plan(), None))
        with pytest.raises(OverloadedError):
            gate.admit(plan(), None).__enter__()
    with gate.admit(plan(), None):
        pass


async def test_what_a_replica_was_given_is_not_to_come_any_more_and_counts_once(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0), "decoder": load(1.0)})
    pending = [stage.pending for stage in gate.stages.all]
    with gate.admit(plan(images=2), None) as admitted:
        assert [(each.seconds, each.pieces) for each in pending] == [(0, 1), (20, 2), (2, 2)]
        for stage in ("encoder", "denoiser", "denoiser", "denoiser", "decoder"):
            admitted.given(stage)
        assert [(each.seconds, each.pieces) for each in pending] == [(0, 0), (0, 0), (1, 1)]
    assert [(each.seconds, each.pieces) for each in pending] == [(0, 0)] * 3


async def test_pictures_beyond_the_bound_are_refused_and_their_returns_are_spread(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(0.1)}, max_images_in_flight=2)
    refused = []
    with gate.admit(plan(images=2), None):
        for _ in range(3):
            with pytest.raises(OverloadedError, match="2 pictures are in work and 2 are allowed") as caught:
                gate.admit(plan(), None).__enter__()
            refused.append(caught.value.retry_after_seconds or 0.0)
    assert 0 < refused[0] < refused[1] < refused[2]
    assert gate.count("safelight_admission_refused_total", reason="credits") == 3
    with gate.admit(plan(images=2), None):
        pass


async def test_more_pictures_than_are_ever_made_at_once_are_not_told_to_come_back(open_gate: OpenGate) -> None:
    gate = await open_gate({}, max_images_in_flight=2)
    with pytest.raises(InvalidRequestError, match="num_images: is 3; this gateway makes at most 2 at once") as caught:
        gate.admit(plan(images=3), None).__enter__()
    assert caught.value.retry_after_seconds is None


async def test_missed_deadlines_are_counted_by_the_stage_reached(open_gate: OpenGate) -> None:
    gate = await open_gate({})
    gate.end(DeadlineExceededError("late"), "denoiser", 60.0)
    gate.end(asyncio.CancelledError(), "decoder", 0.0)
    gate.end(asyncio.CancelledError(), "decoder", 60.0)
    assert gate.count("safelight_deadline_missed_total", stage="denoiser") == 1
    assert gate.count("safelight_deadline_missed_total", stage="decoder") == 1


async def test_estimates_are_compared_with_what_requests_really_took(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(1.0)})
    with gate.admit(plan(), None):
        pass
    gate.end(OverloadedError("full"), "denoiser", 60.0)
    assert gate.count("safelight_estimate_ratio_count") == 1


async def test_what_requests_take_longer_than_estimated_is_added_to_the_next_estimate(open_gate: OpenGate) -> None:
    gate = await open_gate({"denoiser": load(0.0001)})
    with gate.admit(plan(), None) as admitted:
        before = admitted.estimated_seconds
        await asyncio.sleep(0.01)  # the work itself
    with gate.admit(plan(), None) as admitted:
        assert admitted.estimated_seconds == pytest.approx(2 * before)
