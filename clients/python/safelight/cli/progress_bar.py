"""The progress of a request on stderr: a bar, and above it the previews; nothing where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType

from PIL import Image
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import ControlType, Segment

from safelight.cli.half_blocks import HalfBlocks, can_show_pictures
from safelight.types import Accepted, Event, Preview, Progress, Queued

_REPAINTS_PER_SECOND = 4.0


class ProgressBar:
    """Counts the steps of all pictures in the stage at work, if it has several, and shows the newest previews.

    Args:
        images: pictures of the request.
        console: where to.
    """

    def __init__(self, images: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self.shows_previews = can_show_pictures(self._console)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=self._console)
        self._task = self._bars.add_task("starting", total=None)
        self._images = images
        self._done: dict[str, dict[int, int]] = {}  # stage, picture: steps
        self._previews: dict[int, Image.Image] = {}
        self._shown: list[ConsoleRenderable] = []
        self._live = (_SteadyLive if self.shows_previews else Live)(
            get_renderable=lambda: Group(*self._shown, self._bars),
            console=self._console,
            transient=True,
            refresh_per_second=_REPAINTS_PER_SECOND,
        )

    def __enter__(self) -> ProgressBar:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Show what an event tells."""
        if isinstance(event, Accepted):
            self._done.clear()
        elif isinstance(event, Queued):
            self._bars.update(self._task, description=f"{event.stage}: {event.position} requests before this one")
        elif isinstance(event, Progress):
            self._show_progress(event)
        elif isinstance(event, Preview) and self.shows_previews:
            self._previews[event.image_index] = event.image.convert("RGB")
            self._shown = [HalfBlocks([picture for _, picture in sorted(self._previews.items())])]

    def _show_progress(self, event: Progress) -> None:
        self._bars.update(self._task, description=event.stage)
        if event.stage == "denoiser" or event.steps > 1:  # of a picture the denoiser's bar stays
            done = self._done.setdefault(event.stage, {})
            done[event.image_index] = event.step
            self._bars.update(self._task, completed=sum(done.values()), total=event.steps * self._images)


class _SteadyLive(Live):
    """Lets the terminal show a repaint when it is whole, so that it does not flicker."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_BEGIN_REPAINT, *super().process_renderables(renderables), _END_REPAINT]


class _TerminalMode:
    """A control sequence on its way through rich, which has no name for it."""

    def __init__(self, sequence: str) -> None:
        self._sequence = sequence

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self._sequence, None, [(ControlType.CARRIAGE_RETURN,)])


# DEC mode 2026, synchronised output; a terminal that does not have it takes no notice.
_BEGIN_REPAINT, _END_REPAINT = _TerminalMode("\x1b[?2026h"), _TerminalMode("\x1b[?2026l")
