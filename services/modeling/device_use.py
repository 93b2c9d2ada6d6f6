"""What a stage's models take of the device: told in metrics, and given back when there is no work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from services.common.metrics import Metrics
from services.modeling.placement import PlacedWeights

Result = TypeVar("Result")


class Placed(Protocol):
    """A model of any stage."""

    @property
    def weights(self) -> Sequence[PlacedWeights]:
        """Of its networks."""
        ...


class DeviceUse:
    """The weights of all models of a stage.

    Args:
        stage: its name in the metrics.
        models: by name.
        metrics: where their bytes are told.
    """

    def __init__(self, stage: str, models: Mapping[str, Placed], metrics: Metrics) -> None:
        self._weights = [weights for model in models.values() for weights in model.weights]
        for name, model in models.items():
            _report(metrics, (stage, name), model.weights)

    def leave(self) -> None:
        """There is no work: what need not stay on the device leaves it."""
        for weights in self._weights:
            weights.leave()

    def run(self, computation: Callable[[], Result], is_idle: Callable[[], bool]) -> Result:
        """The computation's result; if nothing else waits, the device is given back before it is told."""
        try:
            return computation()
        finally:
            if is_idle():
                self.leave()


def _report(metrics: Metrics, labels: tuple[str, str], networks: Sequence[PlacedWeights]) -> None:
    accounts = [weights.account for weights in networks]
    metrics.weights_resident_bytes.labels(*labels).set_function(
        lambda: sum(account.resident_bytes for account in accounts)
    )
    metrics.weights_peak_bytes.labels(*labels).set_function(lambda: sum(account.peak_bytes for account in accounts))
    streamed = metrics.weights_streamed_bytes.labels(*labels)
    for account in accounts:
        account.on_streamed = streamed.inc
