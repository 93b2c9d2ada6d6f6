"""The progress of a request as a bar on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from safelight.types import Event, Progress, Queued


class ProgressBar:
    """Counts the denoising steps of all pictures, and says which stage is at work.

    Args:
        images: pictures of the request.
    """

    def __init__(self, images: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bars.add_task("starting", total=None)
        self._images = images
        self._done: dict[int, int] = {}

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: Event) -> None:
        """Show what an event tells."""
        if isinstance(event, Queued):
            self._bars.update(self._task, description=f"{event.stage}: {event.position} requests before this one")
        elif isinstance(event, Progress):
            self._show_progress(event)

    def _show_progress(self, event: Progress) -> None:
        self._bars.update(self._task, description=event.stage)
        if event.stage == "denoiser":
            self._done[event.image_index] = event.step
            self._bars.update(self._task, completed=sum(self._done.values()), total=event.steps * self._images)
