"""A picture on a terminal: each character is two pixels, one above the other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

_UPPER_HALF = "▀"
_MOST_COLUMNS = 64
_ROWS_FOR_OTHERS = 3


def can_show_pictures(console: Console) -> bool:
    """Whether a terminal has the colours and the character."""
    return (
        console.is_terminal
        and console.color_system == "truecolor"
        and console.encoding.startswith("utf")
        and not console.legacy_windows
    )


class HalfBlocks:
    """Pictures side by side, as large as the terminal and `_MOST_COLUMNS` for each allow."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self._strip = _side_by_side(pictures)
        self._widest = _MOST_COLUMNS * len(pictures)
        self._drawn: tuple[tuple[int, int], list[Segment]] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        box = (min(options.max_width, self._widest), 2 * max(console.height - _ROWS_FOR_OTHERS, 1))
        if self._drawn is None or self._drawn[0] != box:  # a repaint of the same costs no new styles
            self._drawn = box, _draw(_fitted(self._strip, box))
        yield from self._drawn[1]


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (sum(each.width for each in pictures), max(each.height for each in pictures)))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    return strip


def _fitted(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """The picture as large as a box [pixels] allows, with an even height."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    width, rows = max(1, int(picture.width * scale)), max(1, int(picture.height * scale / 2))
    return picture.resize((width, 2 * rows), Image.Resampling.BICUBIC)


def _draw(picture: Image.Image) -> list[Segment]:
    pixels = picture.tobytes()
    width, height = picture.size
    segments = []
    for top in range(0, height, 2):
        for column in range(width):
            segments.append(Segment(_UPPER_HALF, _style(pixels, top * width + column, (top + 1) * width + column)))
        segments.append(Segment.line())
    return segments


def _style(pixels: bytes, upper: int, lower: int) -> Style:
    return Style(color=_colour(pixels, upper), bgcolor=_colour(pixels, lower))


def _colour(pixels: bytes, place: int) -> Color:
    return Color.from_rgb(*pixels[3 * place : 3 * place + 3])
