"""A request that was let in, and what of it is still to come to the stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.catalog import Stages
from gateway.estimate import Estimate
from gateway.plan import GenerationPlan


@dataclass
class Admitted:
    """A request that was let in.

    Args:
        plan: what is to be made; with fewer steps than were asked for, where only they fit.
        estimate: what it will take of the stages; None: nothing like it has been measured.
        stages: the replicas.
        stage: how far it has come: the last stage that was given a part of it.
    """

    plan: GenerationPlan
    estimate: Estimate | None
    stages: Stages
    stage: str = "gateway"
    _pending: dict[str, int] = field(default_factory=dict)

    @property
    def estimated_seconds(self) -> float:
        """Seconds until the result; 0: there is no estimate."""
        return self.estimate.total_seconds if self.estimate else 0.0

    def start(self) -> None:
        """Count every part of it as to come."""
        images = len(self.plan.images)
        self._pending = {"encoder": 1, "denoiser": images, "decoder": images + bool(self.plan.inputs.size)}
        for stage in self.stages.all:
            stage.pending.add(self._seconds(stage.stage), self._pending[stage.stage])

    def given(self, stage: str) -> None:
        """A replica of a stage was given a part of the request; what is given again after a failure is not to come."""
        self.stage = stage
        if self._pending[stage]:
            self._take(stage, 1)

    def end(self) -> None:
        """Nothing more of it is to come."""
        for stage, pieces in self._pending.items():
            self._take(stage, pieces)

    def _take(self, stage: str, pieces: int) -> None:
        self._pending[stage] -= pieces
        self.stages.by_name[stage].pending.add(self._seconds(stage), -pieces)

    def _seconds(self, stage: str) -> float:
        """Seconds of one of its parts."""
        part = self.estimate.stages.get(stage) if self.estimate else None
        return part.each if part else 0.0
