"""What is worth another try, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.replicas import Replica
from gateway.stage_calls import StageCallError
from safelight.errors import (
    FingerprintMismatchError,
    LeaseExpiredError,
    OverloadedError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
)
from services.common.metrics import Metrics

_REPEATABLE = (OverloadedError, StageUnavailableError, FingerprintMismatchError)


class InputsLostError(Exception):
    """The tensors that a stage was given are gone or damaged: the stage that made them must run again."""

    def __init__(self, error: SafelightError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Attempts:
    """The tries of one stage for one picture: how many are left, and which replicas have failed.

    Every stage is a pure function of its request, so any of them may run again: on another replica when one can't be
    reached, is stopping, is full, or has other weights. One that hands its work back has not failed.
    """

    stage: str
    most: int
    metrics: Metrics
    failed: set[Replica] = field(default_factory=set)
    _used: int = 0

    def note(self, failure: StageCallError) -> None:
        """Returns if the stage is to be tried again.

        Raises:
            InputsLostError: it is of no use before the stage ahead of it has run again.
            SafelightError: the stage's own error, if another try would not help.
        """
        if _inputs_lost(failure.error):
            raise InputsLostError(failure.error) from failure
        self.failed.add(failure.replica)
        self._used += failure.loss != "drain"
        if self._used >= self.most or not (failure.loss or isinstance(failure.error, _REPEATABLE)):
            raise failure.error from failure
        self.metrics.retries.labels(self.stage).inc()

    def note_progress(self) -> None:
        """The work has come further than ever before: what failed until now is forgiven."""
        self._used = 0
        self.failed.clear()


def _inputs_lost(error: SafelightError) -> bool:
    """Whether a tensor of the request is gone, damaged, or made by other weights than those it was planned with."""
    if isinstance(error, FingerprintMismatchError):
        return not error.metadata.get("field", "").startswith("context.")
    holder_gone = isinstance(error, StageUnavailableError) and "endpoint" in error.metadata
    return holder_gone or isinstance(error, (LeaseExpiredError, TensorCorruptError))
