"""How busy a replica is: its last report, and the work given to it since. Pure, over times that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.costs import Costs
from gateway.estimate import ReplicaLoad
from gateway.work import Work
from safelight.v1.load_service_pb2 import GetLoadResponse

# Work on its way to a replica, which fetches tensors before it queues it, is missing in a report asked for meanwhile.
_ON_ITS_WAY_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class Given:
    """A piece of work that was given to a replica.

    Args:
        seconds: what it takes of the device there; 0 if nothing like it was measured.
        at: when it was given.
    """

    seconds: float
    at: float


class Backlog:
    """What a replica has to do, as well as the gateway knows."""

    def __init__(self) -> None:
        self.report = GetLoadResponse()
        self.costs = Costs()
        self._asked_at = 0.0
        self._given: set[Given] = set()

    def update(self, report: GetLoadResponse, asked_at: float) -> None:
        """Take in the replica's own report, asked for at a time."""
        self.report, self.costs, self._asked_at = report, Costs(report.costs), asked_at

    def give(self, work: Work, now: float) -> Given:
        """Count a piece of work until `take_back`."""
        given = Given(self.costs.device_seconds(work) or 0.0, now)
        self._given.add(given)
        return given

    def take_back(self, given: Given) -> None:
        """A piece of work has ended, in whatever way."""
        self._given.remove(given)

    def at(self, now: float) -> ReplicaLoad:
        """What was reported, less what has been done since, and what was given since."""
        unreported = [given for given in self._given if given.at > self._asked_at - _ON_ITS_WAY_SECONDS]
        reported_seconds = max(self.report.backlog_seconds - (now - self._asked_at), 0.0)
        return ReplicaLoad(
            backlog_seconds=reported_seconds + sum(given.seconds for given in unreported),
            requests=self.report.running + self.report.waiting + len(unreported),
            costs=self.costs,
        )
