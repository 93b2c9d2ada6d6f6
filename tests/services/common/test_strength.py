"""How many steps a strength stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.strength import start_step, steps_run

STEPS = st.integers(1, 200)


@pytest.mark.parametrize(
    ("strength", "run"), [(1.0, 20), (0.8, 17), (0.7, 15), (0.5, 11), (0.05, 2), (0.049, 1), (0, 1)]
)
def test_the_steps_are_those_of_the_peer(strength: float, run: int) -> None:
    assert steps_run(20, strength) == run


@given(STEPS, st.floats(0, 1))
def test_a_weaker_change_enters_later_and_always_leaves_a_step(steps: int, strength: float) -> None:
    assert 0 <= start_step(steps, strength) <= start_step(steps, strength / 2) < steps


@given(STEPS, st.integers(0, 100))
def test_a_strength_that_travelled_as_a_float32_stands_for_the_same_steps(steps: int, hundredths: int) -> None:
    strength = hundredths / 100
    assert start_step(steps, float(np.float32(strength))) == start_step(steps, strength)


@pytest.mark.parametrize("strength", [-0.01, 1.7, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        start_step(20, strength)
