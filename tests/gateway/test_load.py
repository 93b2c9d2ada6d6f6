"""Laws of a replica's backlog: what it reported, less the time since, and what it was given since."""

from __future__ import annotations

import pytest

from gateway.load import Backlog
from gateway.work import Work
from safelight.v1.load_service_pb2 import GetLoadResponse, WorkCost

STEP = WorkCost(model="tiny", latent_shape=[4, 8, 8], rows=1, seconds=0.1)
WORK = Work("tiny", (4, 8, 8), passes=10)


def backlog(seconds: float = 0.0, asked_at: float = 100.0, running: int = 0) -> Backlog:
    reported = Backlog()
    reported.update(GetLoadResponse(backlog_seconds=seconds, running=running, costs=[STEP]), asked_at)
    return reported


def test_a_report_ages_at_the_pace_of_the_clock() -> None:
    reported = backlog(5.0)
    assert [reported.at(now).backlog_seconds for now in (100.0, 103.0, 110.0)] == [5.0, 2.0, 0.0]


def test_work_given_since_the_report_counts_until_it_ends() -> None:
    replica = backlog(5.0, running=2)
    given = replica.give(WORK, 101.0)
    assert replica.at(101.0).backlog_seconds == pytest.approx(5.0)
    assert replica.at(101.0).requests == 3
    replica.take_back(given)
    assert replica.at(101.0).backlog_seconds == pytest.approx(4.0)
    assert replica.at(101.0).requests == 2


def test_the_next_report_has_what_was_given_well_before_it() -> None:
    replica = backlog()
    replica.give(WORK, 101.0)
    replica.update(GetLoadResponse(backlog_seconds=0.7, running=1, costs=[STEP]), 102.0)
    assert replica.at(102.0).backlog_seconds == pytest.approx(0.7)
    assert replica.at(102.0).requests == 1


def test_work_on_its_way_while_the_report_was_made_counts_beside_it() -> None:
    replica = backlog()
    replica.give(WORK, 101.99)
    replica.update(GetLoadResponse(costs=[STEP]), 102.0)
    assert replica.at(102.0).backlog_seconds == pytest.approx(1.0)


def test_work_of_unknown_cost_counts_as_a_request_of_no_time() -> None:
    replica = Backlog()
    replica.give(WORK, 1.0)
    assert (replica.at(1.0).backlog_seconds, replica.at(1.0).requests) == (0.0, 1)
