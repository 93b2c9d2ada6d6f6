"""What a lost replica did to the requests that it was working on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bench.closed_loop import Drawing
from safelight import GeneratedImage

# Steps that a replica reported before the blow may reach the client this much later.
_ON_THEIR_WAY_SECONDS = 0.1


@dataclass(frozen=True)
class Blow:
    """A replica was killed or frozen.

    Args:
        kind: "kill" or "freeze".
        address: of the replica.
        time: of `time.monotonic()`.
    """

    kind: str
    address: str
    time: float


@dataclass(frozen=True)
class Verdict:
    """What a run did to its requests."""

    drawn: int
    lost: int
    wrong: int

    @property
    def is_flawless(self) -> bool:
        """Every request got the picture that it gets undisturbed."""
        return not self.lost and not self.wrong


def judge(drawings: Sequence[Drawing], undisturbed: Sequence[GeneratedImage]) -> Verdict:
    """Compare every file with the one that the same request made undisturbed, byte for byte."""
    pairs = [(drawing.image, undisturbed[drawing.request]) for drawing in drawings if drawing.image]
    return Verdict(len(drawings), len(drawings) - len(pairs), sum(made.data != other.data for made, other in pairs))


def seconds_to_resume(blows: Sequence[Blow], drawings: Sequence[Drawing]) -> list[float]:
    """Of every picture that was taken from a denoiser: from the blow to the first step that its client had not seen.

    Steps that are computed again are not reported again, so their time is part of it. A picture that is hit once more
    before it has gone on counts from the later blow; one without a step left to do does not count.
    """
    seconds: dict[tuple[int, float], float] = {}
    for blow, (index, drawing) in itertools.product(blows, enumerate(drawings)):
        if _is_interrupted(drawing, blow) and (resumed := _resumed_at(drawing, blow)):
            since = seconds.get((index, resumed), resumed - blow.time)
            seconds[index, resumed] = min(since, resumed - blow.time)
    return list(seconds.values())


def _is_interrupted(drawing: Drawing, blow: Blow) -> bool:
    """Whether the picture was in work when a denoiser was hit that it was then taken from."""
    if drawing.image is None or not drawing.started < blow.time < drawing.ended:
        return False
    denoisers = [stage.replica for stage in drawing.image.stages if stage.stage == "denoiser"]
    return blow.address in denoisers[:-1]


def _resumed_at(drawing: Drawing, blow: Blow) -> float | None:
    """The end of the longest silence that begins about when the blow falls."""
    times = [drawing.started, *(time for time, _ in drawing.steps)]
    silences = [
        (after - before, after)
        for before, after in itertools.pairwise(times)
        if before < blow.time + _ON_THEIR_WAY_SECONDS and after > blow.time
    ]
    return max(silences)[1] if silences else None
