"""Laws of a stage's use of its device: it leaves when nothing waits, and tells what its weights take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from services.common.metrics import Metrics
from services.modeling.device_use import DeviceUse
from services.modeling.placement import PlacedWeights
from services.modeling.residency import Residency
from services.modeling.weight_streaming import OffloadedWeights, WeightBlock
from services.modeling.weight_transfer import SynchronousTransfer

BYTES = 4 * 64 * 64


class Model:
    """A linear map that visits the device."""

    def __init__(self) -> None:
        self.network = nn.Linear(64, 64, bias=False).requires_grad_(False)
        blocks, visiting = [WeightBlock("all", (self.network,))], Residency(leaves_when_idle=True)
        placed = OffloadedWeights(blocks, visiting, SynchronousTransfer(torch.device("cpu")))
        self.weights: Sequence[PlacedWeights] = (placed,)

    def compute(self) -> torch.Tensor:
        y: torch.Tensor = self.network(torch.ones(1, 64))
        return y


def told(metrics: Metrics, what: str) -> float | None:
    return metrics.registry.get_sample_value(f"safelight_weights_{what}", {"stage": "decoder", "model": "m"})


@pytest.mark.parametrize(("is_idle", "resident"), [(True, 0), (False, BYTES)])
def test_weights_leave_with_the_last_work(is_idle: bool, resident: int) -> None:
    model, metrics = Model(), Metrics()
    use = DeviceUse("decoder", {"m": model}, metrics)
    use.run(model.compute, lambda: is_idle)
    assert told(metrics, "resident_bytes") == resident
    assert told(metrics, "peak_bytes") == told(metrics, "streamed_bytes_total") == BYTES


def test_weights_leave_after_a_failure_too() -> None:
    model, metrics = Model(), Metrics()
    use = DeviceUse("decoder", {"m": model}, metrics)

    def fail() -> None:
        model.compute()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use.run(fail, lambda: True)
    assert told(metrics, "resident_bytes") == 0
