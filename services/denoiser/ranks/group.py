"""A model's group of ranks: started, watched, and started again when one is lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread
from typing import Any

from safelight.errors import CheckpointError, ModelRestartingError, SafelightError
from services.common.availability import Availability
from services.common.manifest import ModelEntry
from services.common.metrics import Metrics
from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.ranks.alive import Alive
from services.denoiser.ranks.commands import Command, Load, Loaded
from services.denoiser.ranks.entrance import Entrance
from services.denoiser.ranks.meeting import LOOPBACK, open_store
from services.denoiser.ranks.messages import Channel
from services.denoiser.ranks.ranks import Member, Ranks, RanksLostError
from services.modeling.lora.adapter import Adapter

_log = logging.getLogger("safelight.ranks")

_FIRST_PAUSE_SECONDS, _MOST_DOUBLINGS = 0.25, 7  # 32 seconds at most
_STEADY_SECONDS = 60.0  # ranks that have lived for so long were started well


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """Which processes make a group.

    Args:
        entry: the model, with paths on this machine.
        degrees: in which ways they share it.
        devices: of each rank, those of this machine first.
        here: ranks of this machine.
        entrance: where the others come in; None: there are none.
        threads: of each one's CPU computation.
        log_level: as in the settings.
        answer_seconds: longest time for a command.
    """

    entry: ModelEntry
    degrees: ParallelDegrees
    devices: Sequence[str]
    here: int
    entrance: Entrance | None
    threads: int
    log_level: str
    answer_seconds: float


def restarting_error(model: str, cause: str) -> ModelRestartingError:
    """The error of work that a model's ranks can't do."""
    return ModelRestartingError(
        f"model {model!r}: {cause}; its ranks are started again: go on then, from the last checkpoint",
        stage="denoiser",
        model=model,
    )


class RankGroup:
    """The ranks of one model, whichever processes they are at the moment.

    Args:
        plan: what to start.
        metrics: where ranks and restarts are counted.
        availability: told when the model goes and comes back.

    Raises:
        CheckpointError: the network can't be read, or shared so.
    """

    def __init__(self, plan: GroupPlan, metrics: Metrics, availability: Availability) -> None:
        self.adapters: Alive[Adapter] = Alive()
        self._plan = plan
        self.name = plan.entry.name
        self._availability = availability
        self._restarts = metrics.rank_restarts.labels(self.name)
        self._changing = Lock()
        self._closing = Event()
        self._fingerprints: set[str] = set()
        self.ranks, self.loaded = self._start()
        metrics.ranks.labels(self.name).set_function(lambda: self.ranks.running)
        self._keeper = Thread(target=self._keep, name="rank-group", daemon=True)
        self._keeper.start()

    def call(self, command: Command) -> list[Any]:
        """What the ranks answer to a command, in order.

        Raises:
            ModelRestartingError: they are lost, and being started again.
            Exception: what a rank has failed with, as it would in this process, also if the others are lost by that.
        """
        ranks = self.ranks
        try:
            return ranks.call_all(command, self._plan.answer_seconds)
        except RanksLostError as lost:
            self._note_loss(ranks)
            if isinstance(lost.error, (SafelightError, MemoryError)):  # the request's fault: it is not to come again
                raise lost.error from lost
            raise restarting_error(self.name, str(lost)) from lost

    def close(self) -> None:
        """End all ranks."""
        self._closing.set()
        if self._plan.entrance is not None:
            self._plan.entrance.close()
        self.ranks.kill()
        self._starting.kill()
        self._keeper.join()

    def _note_loss(self, ranks: Ranks) -> None:
        """Whoever sees it first tells it, so that it is known before anybody hears of failed work."""
        with self._changing:
            if self.ranks is ranks and not self._closing.is_set():
                self._availability.tell(self.name, False)

    def _keep(self) -> None:
        """Start the ranks again whenever one is lost."""
        quick_losses = 0
        while True:
            began = time.monotonic()
            self.ranks.lost.wait()
            self._note_loss(self.ranks)
            codes = self.ranks.end()
            quick_losses = quick_losses + 1 if time.monotonic() - began < _STEADY_SECONDS else 0
            if self._closing.wait(_FIRST_PAUSE_SECONDS * 2 ** min(quick_losses, _MOST_DOUBLINGS)):
                return
            _log.error("a rank was lost: all are started again", extra={"model": self.name, "exit_codes": codes})
            self._start_again()

    def _start_again(self) -> None:
        """If that fails, the ranks are still the lost ones, so that there will be another try."""
        self._restarts.inc()
        try:
            ranks, _ = self._start()
        except Exception as error:  # the keeper's loop: whatever it is, it is tried again
            _log.error("the ranks did not start: %s", error, extra={"model": self.name})
        else:
            with self._changing:
                self.ranks = ranks
                self._availability.tell(self.name, True)

    def _start(self) -> tuple[Ranks, Loaded]:
        """New ranks, when they have loaded."""
        plan = self._plan
        elsewhere = plan.entrance.admit(range(plan.here, plan.degrees.ranks)) if plan.entrance else {}
        self._store, address = open_store(plan.entrance.host if plan.entrance else LOOPBACK)
        members = [Member.started() for _ in range(plan.here)]
        members += [Member(Channel(connection)) for _, connection in sorted(elsewhere.items())]
        self._starting = ranks = Ranks(members, self.adapters)
        if self._closing.is_set():
            ranks.kill()
        try:
            return ranks, self._load(ranks, address)
        except BaseException:
            ranks.end()
            raise

    def _load(self, ranks: Ranks, address: tuple[str, int]) -> Loaded:
        try:
            answers = ranks.call(self._loads(address), math.inf)
        except RanksLostError as error:
            cause = CheckpointError(f"model {self.name!r}: {error} while it loaded: see the log")
            raise error.error or cause from error
        self._fingerprints |= {answer.fingerprint for answer in answers}
        if len(self._fingerprints) > 1:
            raise CheckpointError(
                f"model {self.name!r}: its ranks have read different weights: leave the files as they are while they "
                "are served"
            )
        loaded: Loaded = answers[0]
        return replace(loaded, resident_bytes=sum(answer.resident_bytes for answer in answers))

    def _loads(self, address: tuple[str, int]) -> list[Load]:
        plan = self._plan
        return [
            Load(plan.entry, plan.degrees, rank, device, plan.threads, address, plan.log_level)
            for rank, device in enumerate(plan.devices)
        ]
