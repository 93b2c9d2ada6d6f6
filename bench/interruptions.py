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
    lost = [drawing for drawing in drawings if drawing.image is None]
    wrong = [
        drawing for drawing in drawings if drawing.image and drawing.image.data != undisturbed[drawing.request].data
    ]
    return Verdict(len(drawings), len(lost), len(wrong))


def interrupted(blow: Blow, drawings: Sequence[Drawing]) -> list[Drawing]:
    """The requests that were in flight and went to another replica than the one that was hit."""
    return [each for each in drawings if each.started < blow.time < each.ended and blow.address in _left(each)]


def seconds_to_resume(blow: Blow, drawing: Drawing) -> float | None:
    """From a blow to the first step beyond those that the client had been told of; None: there was none left to do.

    Steps that are computed again are not reported again, so they are part of this time.
    """
    times = [drawing.started, *(time for time, _ in drawing.steps)]
    gaps = [
        (after - before, after)
        for before, after in itertools.pairwise(times)
        if before < blow.time + _ON_THEIR_WAY_SECONDS and after > blow.time
    ]
    return max(gaps)[1] - blow.time if gaps else None


def _left(drawing: Drawing) -> list[str]:
    """The denoisers that a picture was taken from."""
    if drawing.image is None:
        return []
    return [stage.replica for stage in drawing.image.stages if stage.stage == "denoiser"][:-1]
