"""Laws of the shared checks: what is right yields nothing, what is wrong names the field and the remedy."""

from __future__ import annotations

import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from safelight.errors import FieldViolation
from safelight.v1.work_pb2 import DeterminismClass, WorkContext
from services.common.validation import MAX_SEED, check_deadline, check_determinism, check_range, check_seed


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_a_number_in_range_is_right(value: float) -> None:
    assert list(check_range("strength", value, 0, 1)) == []


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_number_out_of_range_or_not_finite_is_wrong(value: float) -> None:
    assert list(check_range("strength", value, 0, 1)) == [
        FieldViolation("strength", f"is {value:g}; must be from 0 to 1")
    ]


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_a_seed_from_0_is_right(seed: int) -> None:
    assert list(check_seed("seed", seed)) == []


def test_a_negative_seed_is_wrong() -> None:
    (violation,) = check_seed("seed", -1)
    assert (violation.field, violation.description[:5]) == ("seed", "is -1")


@pytest.mark.parametrize("deadline", [None, Timestamp(), Timestamp(seconds=253402300799, nanos=999_999_999)])
def test_a_deadline_that_a_timestamp_can_hold_is_right(deadline: Timestamp | None) -> None:
    assert list(check_deadline(WorkContext(deadline=deadline))) == []


@pytest.mark.parametrize("deadline", [Timestamp(seconds=-(2**63)), Timestamp(seconds=2**40), Timestamp(nanos=-1)])
def test_a_deadline_that_is_no_moment_is_wrong(deadline: Timestamp) -> None:
    (violation,) = check_deadline(WorkContext(deadline=deadline))
    assert violation.field == "context.deadline"


@pytest.mark.parametrize("value", DeterminismClass.values())
def test_a_determinism_class_of_the_contract_is_right(value: DeterminismClass.ValueType) -> None:
    assert list(check_determinism(value)) == []


def test_a_determinism_class_that_the_contract_lacks_is_wrong_and_the_choice_is_told() -> None:
    (violation,) = check_determinism(99)  # type: ignore[arg-type]  # as a client of a later release might send
    assert violation.field == "determinism"
    assert "DETERMINISM_CLASS_EXACT" in violation.description
