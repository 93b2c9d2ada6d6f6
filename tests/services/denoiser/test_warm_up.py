"""Laws of the warm-up: what steps cost is known before the first request, and learning it takes a bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.common.manifest import ModelEntry, load_manifest
from services.denoiser.cost_curve import StepCosts
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import BatchKey
from services.denoiser.registry import LOADERS
from services.denoiser.warm_up import warm_up
from services.modeling.loading import load_models
from tests.support.tiny_wan import save_tiny_wan

USUAL = BatchKey("tiny", (4, 16, 16), 77, exact=False)


@pytest.fixture(scope="module")
def engine(tiny_manifest: str) -> DenoiserEngine:
    return DenoiserEngine(load_models(load_manifest(tiny_manifest), LOADERS, torch.device("cpu")), batch_cfg=True)


def measured(engine: DenoiserEngine, seconds: float, max_rows: int) -> dict[tuple[object, int], float]:
    costs = StepCosts()
    models = {name: model.describe(name) for name, model in engine.models.items()}
    warm_up(engine, models, costs, steps=2, seconds=seconds, max_rows=max_rows)
    return {(point.batch_key, point.rows): point.seconds for point in costs.points()}


def test_batches_of_1_2_4_rows_are_measured_up_to_the_largest_under_the_key_of_usual_requests(
    engine: DenoiserEngine,
) -> None:
    points = measured(engine, seconds=60.0, max_rows=6)
    assert set(points) == {(USUAL, 1), (USUAL, 2), (USUAL, 4), (USUAL._replace(exact=True), 1)}
    assert all(seconds > 0 for seconds in points.values())


def test_without_time_nothing_is_measured(engine: DenoiserEngine) -> None:
    assert measured(engine, seconds=0.0, max_rows=8) == {}


def test_a_long_step_of_a_film_is_not_begun(tmp_path: Path) -> None:
    entry = ModelEntry(name="tiny", path=str(save_tiny_wan(tmp_path / "wan")))
    engine = DenoiserEngine(load_models([entry], LOADERS, torch.device("cpu")), batch_cfg=True)
    assert measured(engine, seconds=1.0, max_rows=8) == {}
