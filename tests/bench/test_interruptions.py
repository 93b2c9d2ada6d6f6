"""What a run under fire is judged by: lost and different files, and the time until a picture goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from bench.closed_loop import Drawing
from bench.interruptions import Blow, judge, seconds_to_resume
from safelight import GeneratedImage

FIRST, SECOND, THIRD = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"


def picture(data: bytes, *denoisers: str) -> GeneratedImage:
    stages = tuple(SimpleNamespace(stage="denoiser", replica=replica) for replica in denoisers)
    return cast(GeneratedImage, SimpleNamespace(data=data, stages=stages))


def drawing(times: list[float], *denoisers: str) -> Drawing:
    """A picture drawn from second 0 to 100 whose steps were reported at the times."""
    steps = [(time, step) for step, time in enumerate(times, 1)]
    return Drawing(0, 0.0, 100.0, steps, picture(b"", *denoisers))


def test_every_lost_and_every_different_file_is_counted() -> None:
    undisturbed = [picture(b"a"), picture(b"b")]
    drawings = [
        Drawing(0, 0.0, image=picture(b"a")),
        Drawing(1, 0.0, image=picture(b"a")),
        Drawing(1, 0.0, image=None, error="lost"),
        Drawing(1, 0.0, image=picture(b"b")),
    ]
    verdict = judge(drawings, undisturbed)
    assert (verdict.drawn, verdict.lost, verdict.wrong) == (4, 1, 1)
    assert not verdict.is_flawless
    assert judge(drawings[::3], undisturbed).is_flawless


def test_a_step_that_was_on_its_way_when_the_blow_fell_does_not_count_as_resumed() -> None:
    blow = Blow("kill", FIRST, 10.0)
    assert seconds_to_resume([blow], [drawing([8.0, 9.0, 10.01, 13.0, 14.0], FIRST, SECOND)]) == [pytest.approx(3.0)]


def test_a_picture_that_is_hit_again_before_it_goes_on_counts_from_the_later_blow() -> None:
    blows = [Blow("kill", FIRST, 10.0), Blow("kill", SECOND, 12.0)]
    assert seconds_to_resume(blows, [drawing([9.0, 13.0, 14.0], FIRST, SECOND, THIRD)]) == [pytest.approx(1.0)]


def test_pictures_elsewhere_and_those_without_a_step_left_do_not_count() -> None:
    blow = Blow("kill", FIRST, 10.0)
    stayed, came_back = drawing([9.0, 11.0], FIRST), drawing([9.0, 11.0], SECOND, FIRST)
    complete = drawing([8.0, 9.0], FIRST, SECOND)
    assert seconds_to_resume([blow], [stayed, came_back, complete]) == []
