"""Which precision a CPU multiplies in fastest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.modeling import product_speed


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    product_speed.bfloat16_is_fast.cache_clear()
    yield
    product_speed.bfloat16_is_fast.cache_clear()


@pytest.mark.parametrize(("bfloat16_seconds", "is_fast"), [(0.5, True), (1.0, True), (2.0, False)])
def test_the_quickest_rounds_decide_once_a_process(
    monkeypatch: pytest.MonkeyPatch, bfloat16_seconds: float, is_fast: bool
) -> None:
    quickest = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    disturbances = iter([9.0, 0.0, 0.0, 9.0, 3.0, 3.0, 5.0, 1.0, 0.0, 2.0])
    monkeypatch.setattr(product_speed, "_product_seconds", lambda dtype: quickest[dtype] + next(disturbances))
    assert [product_speed.bfloat16_is_fast() for _ in range(3)] == [is_fast] * 3


def test_a_measurement_takes_a_positive_time_of_this_thread() -> None:
    assert 0 < product_speed._product_seconds(torch.float32) < 60
