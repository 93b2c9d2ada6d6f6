"""Laws of estimates: queues add up, stages overlap, and what shares passes does not wait for what is longer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.costs import Costs
from gateway.estimate import (
    Estimate,
    Pending,
    ReplicaLoad,
    RequestWork,
    StageLoad,
    StageTime,
    estimate,
    stage_time,
)
from gateway.work import Work
from safelight.v1.load_service_pb2 import WorkCost

SHAPE = (4, 8, 8)


def costs(curve: dict[int, float], shape: tuple[int, ...] = SHAPE) -> Costs:
    return Costs(
        WorkCost(model="tiny", latent_shape=shape, rows=rows, seconds=seconds) for rows, seconds in curve.items()
    )


def stage(*backlogs: float, curve: dict[int, float], shape: tuple[int, ...] = SHAPE, requests: int = 0) -> StageLoad:
    return StageLoad([ReplicaLoad(backlog, requests, costs(curve, shape)) for backlog in backlogs])


def request(steps: int = 10, images: int = 1, rows: int = 1) -> RequestWork:
    return RequestWork(
        encode=Work("tiny", rows=2),
        denoise=Work("tiny", SHAPE, rows, steps),
        decode=Work("tiny", SHAPE),
        images=images,
    )


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def time_of(found: StageTime | None) -> StageTime:
    assert found is not None
    return found


def test_the_queue_ahead_and_the_own_steps_add_up() -> None:
    found = known(
        estimate(request(steps=10), stage(curve={}), stage(5.0, curve={1: 0.1}, requests=99), stage(curve={}))
    )
    assert found.seconds == pytest.approx(6.0)
    assert found.idle_seconds == pytest.approx(1.0)


def test_a_short_request_that_shares_passes_does_not_wait_for_a_long_one() -> None:
    time = time_of(stage_time(stage(100.0, curve={1: 0.1, 2: 0.15}, requests=1), request(steps=10).denoise, 1, True))
    assert time.done == pytest.approx(1.5)
    assert time.ahead == pytest.approx(100.0)


def test_stages_without_measurements_count_nothing_but_without_the_denoisers_there_is_no_estimate() -> None:
    nothing = stage(0.0, curve={})
    assert known(estimate(request(), nothing, stage(0.0, curve={1: 0.1}), nothing)).seconds == pytest.approx(1.0)
    assert estimate(request(), nothing, nothing, stage(0.0, curve={1: 1.0})) is None


def test_the_decoders_queue_drains_while_the_denoiser_works() -> None:
    denoiser = stage(0.0, curve={1: 0.1})
    shorter, longer = (stage(backlog, curve={1: 0.5}) for backlog in (0.9, 3.0))
    assert known(estimate(request(), stage(curve={}), denoiser, shorter)).seconds == pytest.approx(1.5)
    assert known(estimate(request(), stage(curve={}), denoiser, longer)).seconds == pytest.approx(3.5)


def test_a_picture_to_start_from_is_encoded_beside_the_prompts_and_before_the_first_step() -> None:
    plane = WorkCost(model="tiny", latent_shape=SHAPE[1:], rows=1, seconds=0.25)
    both = Costs([plane, WorkCost(model="tiny", latent_shape=SHAPE, rows=1, seconds=0.5)])
    decoder = StageLoad([ReplicaLoad(0.0, 0, both)])
    work = replace(request(), encode_image=Work("tiny", SHAPE[1:]))
    found = known(estimate(work, stage(curve={}), stage(0.0, curve={1: 0.1}), decoder))
    assert (found.seconds, found.idle_seconds) == pytest.approx((1.75, 1.75))
    slower = known(estimate(work, stage(0.0, curve={2: 0.3}, shape=()), stage(0.0, curve={1: 0.1}), decoder))
    assert (slower.seconds, slower.idle_seconds) == pytest.approx((1.8, 1.8))
    assert (found.stages["decoder"].busy, found.stages["decoder"].each) == pytest.approx((0.75, 0.375))


def test_several_pictures_go_to_several_replicas() -> None:
    found = time_of(stage_time(stage(0.0, 0.0, curve={1: 1.0}), Work("tiny", SHAPE), 4, shared=False))
    assert (found.each, found.busy, found.alone, found.done) == pytest.approx((1.0, 2.0, 2.0, 2.0))


def test_a_slow_replica_is_left_alone_while_a_fast_one_is_done_sooner() -> None:
    mixed = StageLoad([ReplicaLoad(0.0, 0, costs({1: 10.0})), ReplicaLoad(3.0, 3, costs({1: 1.0}))])
    assert time_of(stage_time(mixed, Work("tiny", SHAPE), 2, shared=False)).done == pytest.approx(5.0)


def test_pictures_of_one_request_share_passes_where_that_pays() -> None:
    found = time_of(stage_time(stage(0.0, curve={1: 1.0, 4: 1.6}), request(steps=10).denoise, 4, shared=True))
    assert found.each == pytest.approx(4.0)
    assert found.done == pytest.approx(16.0)


def test_a_replica_that_has_measured_nothing_yet_is_taken_to_be_as_fast_as_another() -> None:
    mixed = StageLoad([ReplicaLoad(0.0, 0, costs({})), ReplicaLoad(3.0, 1, costs({1: 1.0}))])
    time = time_of(stage_time(mixed, Work("tiny", SHAPE), 1, shared=False))
    assert (time.ahead, time.busy, time.alone, time.done) == pytest.approx((0.0, 0.5, 1.0, 1.0))


def test_work_that_is_to_come_is_ahead_too() -> None:
    loaded = StageLoad([ReplicaLoad(1.0, 0, costs({1: 1.0}))] * 2, Pending(6.0, 6))
    time = time_of(stage_time(loaded, Work("tiny", SHAPE), 1, shared=False))
    assert (time.ahead, time.done) == pytest.approx((4.0, 5.0))


def test_what_has_come_leaves_nothing_behind() -> None:
    pending = Pending()
    for seconds in (0.1, 0.2, 0.3):
        pending.add(seconds, 3)
    for seconds in (0.3, 0.1, 0.2):
        pending.add(seconds, -3)
    assert (pending.seconds, pending.pieces) == (0.0, 0)


@given(
    steps=st.integers(1, 100),
    backlog=st.floats(0, 1000),
    requests=st.integers(0, 30),
    curve=st.dictionaries(st.integers(1, 16), st.floats(0.001, 10), min_size=1),
    images=st.integers(1, 8),
)
def test_an_estimate_is_never_above_the_whole_queue(
    steps: int, backlog: float, requests: int, curve: dict[int, float], images: int
) -> None:
    work = request(steps).denoise
    alone = costs(curve).seconds(work)
    time = time_of(stage_time(stage(backlog, curve=curve, requests=requests), work, images, True))
    assert alone is not None
    assert 0 < time.each <= alone * (1 + 1e-9)
    assert time.done <= (backlog + images * alone) * (1 + 1e-9)
