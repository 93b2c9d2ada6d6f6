"""Which requests share the next forward pass: as many rows as pay, as few as the deadlines ask. Pure.

A merge pays when the cost curve says that the pass does clearly more rows a second than its first request by itself. Of
the sizes that lose the fewest deadlines the one with the best throughput is taken; where merging does not pay, requests
run one after the other.

Estimates promise no gain, so sizes have to be tried: a size above all that are known as soon as there are rows for it
and no deadline is lost by it; the others now and then, for a hundredth of the time, since a curve can change.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic

from services.denoiser.cost_curve import KEPT_KEYS, StepCosts
from services.denoiser.deadlines import given_up, promised
from services.denoiser.step_order import Standing
from services.denoiser.step_work import Request, StepWork

# A merge must do so many times the rows a second that the first request does by itself: timings are never quiet.
_WORTHWHILE = 1.1
# Who shares a pass needs this much more time than such passes take: others may still come between.
_MARGIN = 1.5
# Share of a key's time that may go into sizes that are not the best, to learn what they cost by now.
_TRIAL_SHARE = 0.01


@dataclass(frozen=True)
class ForwardPass(Generic[Request]):
    """Requests that take their next step together.

    Args:
        batch: the requests.
        is_trial: its size is not the one thought best.
    """

    batch: tuple[StepWork[Request], ...]
    is_trial: bool = False

    @property
    def batch_key(self) -> Hashable:
        return self.batch[0].needs.batch_key

    @property
    def rows(self) -> int:
        return sum(work.needs.rows for work in self.batch)

    @property
    def is_alone(self) -> bool:
        return self.batch[0].needs.alone


@dataclass
class _Trials:
    """When each size of a key was last run, in passes of the key, and how much of its time went into trials."""

    passes: int = 0
    seconds: float = 0.0
    trial_seconds: float = 0.0
    last_pass: dict[int, int] = field(default_factory=dict)

    def ran(self, rows: int, seconds: float, is_trial: bool) -> None:
        self.passes += 1
        self.last_pass[rows] = self.passes
        self.seconds += seconds
        self.trial_seconds += seconds if is_trial else 0.0

    def allow(self, seconds: float) -> bool:
        """Whether a trial of so many seconds keeps within the share."""
        return self.trial_seconds + seconds <= _TRIAL_SHARE * self.seconds


class Merging:
    """Decides which requests share a pass.

    Args:
        costs: the cost curves; `ran` refines them.
        max_rows: rows of a pass.
    """

    def __init__(self, costs: StepCosts, max_rows: int) -> None:
        self._costs = costs
        self._max_rows = max_rows
        self._trials: dict[Hashable, _Trials] = {}

    def best_rows(self, batch_key: Hashable, sizes: Iterable[int]) -> int:
        """Of these sizes the one with the best throughput; the smallest where merging does not pay."""
        return self._by_throughput(batch_key, sizes)[0]

    def _by_throughput(self, batch_key: Hashable, sizes: Iterable[int]) -> list[int]:
        rates = {rows: rows / self._costs.seconds(batch_key, rows) for rows in sizes}
        fewest = min(rates)
        rates[fewest] *= _WORTHWHILE
        return sorted(rates, key=lambda rows: (-rates[rows], rows))

    def form(self, ordered: Sequence[Standing[Request]], now: float) -> ForwardPass[Request]:
        """The next pass.

        Args:
            ordered: all requests, the first to be served first; not empty.
            now: the moment at which they were looked at.
        """
        everyone = _fill(ordered, self._max_rows)
        if len(everyone) == 1:
            return ForwardPass((ordered[0].work,))
        outlook = _Outlook(ordered, everyone[0].work.needs.batch_key, self._costs, now)
        sizes = _sizes(everyone)
        rows = best = outlook.least_harmful(self._by_throughput(outlook.batch_key, sizes))
        if (trial := self._trial(outlook, sizes, best)) is not None:
            rows = trial
        mates = [each for each in ordered if shares_pass(ordered[0], each)]
        batch = _fill(sorted(mates, key=lambda each: each.is_hopeless or each.work in outlook.lost(rows)), rows)
        return ForwardPass(tuple(standing.work for standing in batch), rows != best)

    def ran(self, done: ForwardPass[Request], seconds: float) -> None:
        """Learn from a pass."""
        if done.is_alone:
            self._costs.record(done.batch_key, 1, seconds / done.rows)
            return
        self._costs.record(done.batch_key, done.rows, seconds)
        trials = self._trials[done.batch_key] = self._trials.pop(done.batch_key, _Trials())
        trials.ran(done.rows, seconds, done.is_trial)
        if len(self._trials) > KEPT_KEYS:
            del self._trials[next(iter(self._trials))]

    def _trial(self, outlook: _Outlook[Request], sizes: Sequence[int], best: int) -> int | None:
        """The size to be tried now in place of the best.

        It loses no deadline, unless it is above all known sizes: tight deadlines would keep that one unknown for ever.
        """
        trusted = self._costs.trusted_rows(outlook.batch_key)
        trials = self._trials.get(outlook.batch_key, _Trials())

        def is_harmless(rows: int) -> bool:
            return len(outlook.lost(rows)) <= len(outlook.lost(best))

        larger = (rows for rows in reversed(sizes) if rows > trusted and is_harmless(rows))
        if trials.passes and (largest := next(larger, None)) is not None:
            return largest
        by_last_trial = sorted(set(sizes) - {best}, key=lambda rows: (trials.last_pass.get(rows, 0), rows))
        rows = next((rows for rows in by_last_trial if rows > trusted or is_harmless(rows)), best)
        return rows if trials.allow(self._costs.seconds(outlook.batch_key, rows)) else None


class _Outlook(Generic[Request]):
    """What becomes of the deadlines if all passes of a key are of one size."""

    def __init__(self, ordered: Sequence[Standing[Request]], batch_key: Hashable, costs: StepCosts, now: float) -> None:
        self.batch_key = batch_key
        self._promised = promised(ordered)
        self._costs = costs
        self._now = now
        self._lost: dict[int, set[StepWork[Request]]] = {}

    def least_harmful(self, sizes: Sequence[int]) -> int:
        """The first of the sizes that loses the fewest deadlines."""
        for rows in sizes:
            if not self.lost(rows):
                return rows
        return min(sizes, key=lambda rows: len(self.lost(rows)))

    def lost(self, rows: int) -> set[StepWork[Request]]:
        """The requests whose deadlines would be given up."""
        if rows not in self._lost:
            pass_seconds = self._costs.seconds(self.batch_key, rows)
            self._lost[rows] = given_up(self._promised, self._now, partial(self._work_seconds, rows, pass_seconds))
        return self._lost[rows]

    def _work_seconds(self, rows: int, pass_seconds: float, standing: Standing[Request]) -> float | None:
        """Seconds of the device until a request's end; None if passes of this size are too slow for it."""
        needs, left = standing.work.needs, standing.work.left
        if needs.rows >= rows or needs.alone or needs.batch_key != self.batch_key:
            return left * standing.step_seconds
        if standing.deadline_pace < _MARGIN * pass_seconds:
            return None
        return left * pass_seconds * needs.rows / rows


def shares_pass(one: Standing[Request], other: Standing[Request]) -> bool:
    """Whether two requests may be in one forward pass."""
    needs, others = one.work.needs, other.work.needs
    return needs.batch_key == others.batch_key and not needs.alone and not others.alone


def _fill(standings: Sequence[Standing[Request]], max_rows: int) -> list[Standing[Request]]:
    """The first request, and those after it that can share its pass while rows last."""
    batch, rows = [standings[0]], standings[0].work.needs.rows
    for standing in standings[1:]:
        if rows + standing.work.needs.rows <= max_rows and shares_pass(standings[0], standing):
            batch.append(standing)
            rows += standing.work.needs.rows
    return batch


def _sizes(batch: Iterable[Standing[Request]]) -> list[int]:
    """Rows of the batch's beginnings: of its first request, its first two, and so on."""
    sizes, rows = [], 0
    for standing in batch:
        rows += standing.work.needs.rows
        sizes.append(rows)
    return sizes
