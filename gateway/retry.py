"""What is worth another try, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.replicas import Replica
from gateway.stage_calls import StageCallError
from safelight.errors import (
    LeaseExpiredError,
    OverloadedError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
)
from services.common.metrics import Metrics

_REPEATABLE = (OverloadedError, StageUnavailableError)


class InputsLostError(Exception):
    """The tensors that a stage was given are gone or damaged: the stage that made them must run again."""

    def __init__(self, error: SafelightError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Attempts:
    """The tries of one stage for one picture: how many are left, and which replicas have failed.

    Every stage is a pure function of its request, so any of them may run again: on another replica when one can't be
    reached, is stopping or is full.
    """

    stage: str
    left: int
    metrics: Metrics
    failed: set[Replica] = field(default_factory=set)

    def note(self, failure: StageCallError) -> None:
        """Returns if the stage is to be tried again.

        Raises:
            InputsLostError: it is of no use before the stage ahead of it has run again.
            SafelightError: the stage's own error, if another try would not help.
        """
        error = failure.error
        holder_gone = isinstance(error, StageUnavailableError) and "endpoint" in error.metadata
        if holder_gone or isinstance(error, (LeaseExpiredError, TensorCorruptError)):
            raise InputsLostError(error) from failure
        self.left -= 1
        self.failed.add(failure.replica)
        if self.left <= 0 or not (failure.unreachable or isinstance(error, _REPEATABLE)):
            raise error from failure
        self.metrics.retries.labels(self.stage).inc()
