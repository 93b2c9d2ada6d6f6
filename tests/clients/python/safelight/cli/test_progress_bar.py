"""The bar and the previews: whole repaints on a terminal that can show them, nothing at all anywhere else."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from safelight import Accepted, Preview, Progress, Queued
from safelight.cli.half_blocks import HalfBlocks, can_show_pictures
from safelight.cli.progress_bar import ProgressBar

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"


def terminal(**settings: Any) -> Console:
    """A console that believes it is a good terminal."""
    usual: dict[str, Any] = {"color_system": "truecolor", "width": 40, "height": 20, "legacy_windows": False}
    return Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}, **{**usual, **settings})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def preview(index: int, colour: tuple[int, int, int]) -> Preview:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "png")
    return Preview(index, 3, file.getvalue(), "image/png")


def test_a_character_is_two_pixels_one_above_the_other() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putdata([RED, GREEN, BLUE, WHITE])
    console = terminal(width=2)
    console.print(HalfBlocks([picture]))
    assert written(console) == ("\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\x1b[38;2;0;255;0;48;2;255;255;255m▀\x1b[0m\n")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("terminal_size", [(80, 24), (40, 60), (200, 10), (8, 4)])
@pytest.mark.parametrize("picture_size", [(16, 16), (128, 64), (64, 256), (1, 1)])
def test_pictures_fit_the_terminal(count: int, terminal_size: tuple[int, int], picture_size: tuple[int, int]) -> None:
    console = terminal(width=terminal_size[0], height=terminal_size[1])
    console.print(HalfBlocks([Image.new("RGB", picture_size)] * count))
    rows = re.sub(r"\x1b\[[0-9;]*m", "", written(console)).splitlines()
    assert 0 < len(rows) <= terminal_size[1] - 3
    assert 0 < len(rows[0]) <= min(terminal_size[0], 64 * count)


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({}, True),
        ({"color_system": "256"}, False),
        ({"color_system": None}, False),
        ({"legacy_windows": True}, False),
    ],
)
def test_pictures_are_for_terminals_with_true_colours(settings: dict[str, Any], can: bool) -> None:
    assert can_show_pictures(terminal(**settings)) is can


def test_pictures_are_for_terminals_that_have_the_character() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert not can_show_pictures(Console(file=file, force_terminal=True, color_system="truecolor"))


def test_where_there_is_no_terminal_nothing_is_written() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with ProgressBar(1, console) as bar:
        for event in (Accepted("id", (5,), 1.0), Queued(0, "denoiser", 2), Progress(0, "denoiser", 1, 2)):
            bar.show(event)
        bar.show(preview(0, RED))
    assert (written(console), bar.shows_previews) == ("", False)


def test_the_newest_preview_of_every_picture_stands_above_the_bar() -> None:
    console = terminal()
    with ProgressBar(2, console) as bar:
        for event in (preview(1, GREEN), preview(0, RED), preview(0, BLUE), Progress(0, "denoiser", 3, 8)):
            bar.show(event)
    last = written(console).split(BEGIN)[-1]
    picture, _, rest = last.partition("denoiser")
    assert "3/16" in rest
    assert picture.index("38;2;0;0;255") < picture.index("38;2;0;255;0")
    assert "38;2;255;0;0" not in picture


def test_every_repaint_is_shown_at_once() -> None:
    console = terminal()
    with ProgressBar(1, console) as bar:
        bar.show(preview(0, RED))
    text = written(console)
    repaints = text.split(BEGIN)[1:]
    assert text.count("denoiser") == sum(each.count("denoiser") for each in repaints)
    assert len(repaints) == text.count(END)
    assert all("▀" not in each.partition(END)[2] for each in repaints)


def test_a_terminal_without_true_colours_has_the_bar_alone() -> None:
    console = terminal(color_system="256")
    with ProgressBar(1, console) as bar:
        bar.show(preview(0, RED))
        bar.show(Progress(0, "denoiser", 1, 2))
    assert "1/2" in written(console)
    assert "▀" not in written(console)


def test_a_request_that_begins_anew_counts_anew() -> None:
    console = terminal()
    with ProgressBar(2, console) as bar:
        for event in (Progress(1, "denoiser", 7, 8), Accepted("id", (5, 6), None), Progress(0, "denoiser", 1, 8)):
            bar.show(event)
    assert "1/16" in written(console).split(BEGIN)[-1]


def test_the_decoder_of_films_has_steps_to_count_and_that_of_pictures_has_not() -> None:
    console = terminal()
    with ProgressBar(2, console) as bar:
        for event in (Progress(0, "denoiser", 8, 8), Progress(0, "decoder", 4, 5), Progress(1, "decoder", 2, 5)):
            bar.show(event)
        assert "6/10" in shown(bar, console)
        bar.show(Accepted("id", (5, 6), None))
        for event in (Progress(0, "denoiser", 7, 8), Progress(0, "decoder", 1, 1)):
            bar.show(event)
        assert "7/16" in shown(bar, console)


def shown(bar: ProgressBar, console: Console) -> str:
    """What the bar shows now."""
    bar._live.refresh()
    return written(console).split(BEGIN)[-1]
