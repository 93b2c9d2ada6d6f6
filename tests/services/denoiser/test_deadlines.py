"""Laws of giving deadlines up: none without need, and as few as can be."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.cost_curve import StepCosts
from services.denoiser.deadlines import given_up, promised
from services.denoiser.step_order import Standing
from services.denoiser.step_work import StepNeeds, StepWork

Job = tuple[int, float]  # steps of one second, deadline


def lost(jobs: list[Job]) -> set[int]:
    """Positions of the jobs that are given up on a device that does one after the other."""
    costs = StepCosts()
    costs.record("key", 1, 1.0)
    works = [StepWork(StepNeeds(at, "key", 1, steps, deadline=due), 0.0, steps) for at, (steps, due) in enumerate(jobs)]
    standings = [Standing.of(work, costs, 0.0) for work in works]
    return {
        work.needs.request for work in given_up(promised(standings), 0.0, lambda standing: float(standing.work.left))
    }


def all_in_time(jobs: list[Job]) -> bool:
    end = 0.0
    for steps, due in sorted(jobs, key=lambda job: job[1]):
        end += steps
        if end > due:
            return False
    return True


def test_nothing_is_given_up_where_all_can_be_in_time() -> None:
    assert lost([(4, 8.0), (4, 4.0), (10, 18.0)]) == set()


def test_one_long_request_is_given_up_for_many_short_ones() -> None:
    assert lost([(50, 52.0), (4, 53.0), (4, 54.0), (4, 55.0)]) == {0}


def test_hopeless_requests_take_nobodys_time() -> None:
    assert lost([(10, 9.0), (4, 4.0)]) == set()


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(1.0, 40.0)), min_size=1, max_size=7))
def test_as_few_as_can_be_are_given_up(jobs: list[Job]) -> None:
    feasible = [job for job in jobs if job[1] >= job[0]]
    given = lost(jobs)
    assert all_in_time([job for at, job in enumerate(jobs) if at not in given and job in feasible])
    kept = len(feasible) - len(given)
    assert not any(all_in_time(list(more)) for more in combinations(feasible, kept + 1))
