"""What a picture has cost on its way: every replica that worked for it, those that were lost included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics


@dataclass
class Ledger:
    """The account of one picture, for its receipt.

    Args:
        metrics: where recomputed steps are counted.
        timings: what each replica spent, in order.
        steps_run: steps computed on all denoisers together.
        steps_reached: the furthest step that any of them computed.
        steps_recomputed: steps computed again after a loss.
    """

    metrics: Metrics
    timings: list[StageTiming] = field(default_factory=list)
    steps_run: int = 0
    steps_reached: int = 0
    steps_recomputed: int = 0
    _encoded: list[Sequence[StageTiming]] = field(default_factory=list)

    def note_step(self, step: int) -> bool:
        """Count a step that was computed; returns whether it is the furthest so far."""
        self.steps_run += 1
        if step > self.steps_reached:
            self.steps_reached = step
            return True
        self.steps_recomputed += 1
        self.metrics.recomputed_steps.inc()
        return False

    def note_encoded(self, timings: Sequence[StageTiming]) -> None:
        """Take what was spent on the request's inputs, unless these very runs are in the account already."""
        if not any(timings is noted for noted in self._encoded):
            self._encoded.append(timings)
            self.timings.extend(timings)
