"""What is worth another try, and how often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.replicas import Replica
from gateway.stage_calls import StageCallError
from safelight.errors import (
    FingerprintMismatchError,
    LeaseExpiredError,
    OverloadedError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
    UnknownAdapterError,
)
from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics

Answer = TypeVar("Answer")
_REPEATABLE = (OverloadedError, StageUnavailableError, FingerprintMismatchError, UnknownAdapterError)
_LONGEST_PAUSE_SECONDS = 1.0


class InputsLostError(Exception):
    """The tensors that a stage was given are gone or damaged: the stage that made them must run again."""

    def __init__(self, error: SafelightError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Attempts:
    """The tries of one stage for one picture: how many are left, and which replicas have failed.

    Every stage is a pure function of its request, so any of them may run again: on another replica when one can't be
    reached, is stopping, is full, or has other weights or adapters. One that hands its work back has not failed.

    Args:
        stage: its name.
        most: tries without any progress.
        metrics: where they are counted.
        failed: replicas to avoid.
    """

    stage: str
    most: int
    metrics: Metrics
    failed: set[Replica] = field(default_factory=set)
    _used: int = 0
    _full_since: float | None = None

    async def repeat(
        self, call: Callable[[], Awaitable[Answer]], lost: list[StageTiming], patience_seconds: float = 0.0
    ) -> Answer:
        """What a call answers, made until it does.

        Args:
            call: makes it once, and avoids the replicas that have failed.
            lost: takes the replicas that were lost on the way.
            patience_seconds: see `recover`.

        Raises:
            InputsLostError, SafelightError: see `recover`.
        """
        while True:
            try:
                return await call()
            except StageCallError as failure:
                if failure.loss is not None:
                    lost.append(StageTiming(stage=self.stage, replica=failure.replica.address))
                await self.recover(failure, patience_seconds)

    async def recover(self, failure: StageCallError, patience_seconds: float = 0.0) -> None:
        """Returns when the stage is to be tried again.

        Args:
            failure: of the last try.
            patience_seconds: how long full replicas are waited for; work that has come far is worth a wait.

        Raises:
            InputsLostError: it is of no use before the stage ahead of it has run again.
            SafelightError: the stage's own error, if another try would not help.
        """
        if _inputs_lost(failure.error):
            raise InputsLostError(failure.error) from failure
        self.failed.add(failure.replica)
        if isinstance(failure.error, OverloadedError) and self._is_patient(patience_seconds):
            await asyncio.sleep(min(failure.error.retry_after_seconds or 0.0, _LONGEST_PAUSE_SECONDS))
        else:
            self._used += failure.loss != "drain"
            if self._used >= self.most or not (failure.loss or isinstance(failure.error, _REPEATABLE)):
                raise failure.error from failure
        self.metrics.retries.labels(self.stage).inc()

    def note_progress(self) -> None:
        """The work has come further than ever before: what failed until now is forgiven."""
        self._used, self._full_since = 0, None
        self.failed.clear()

    def _is_patient(self, patience_seconds: float) -> bool:
        self._full_since = self._full_since or time.monotonic()
        return time.monotonic() - self._full_since < patience_seconds


def _inputs_lost(error: SafelightError) -> bool:
    """Whether a tensor of the request is gone, damaged, or made by other weights than those it was planned with."""
    if isinstance(error, FingerprintMismatchError):
        return not error.metadata.get("field", "").startswith("context.")
    holder_gone = isinstance(error, StageUnavailableError) and "endpoint" in error.metadata
    return holder_gone or isinstance(error, (LeaseExpiredError, TensorCorruptError))
