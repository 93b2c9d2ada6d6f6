"""What the client is told of one picture. It never goes backwards: work that is done again is told once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safelight.v1.denoiser_service_pb2 import LatentPreview
from safelight.v1.generation_service_pb2 import GeneratePreview, GenerateProgress, GenerateQueued, GenerateResponse
from safelight.v1.work_pb2 import FileChunk
from services.common.metrics import Metrics

Emit = Callable[[GenerateResponse], None]
_STAGES = ("encoder", "denoiser", "decoder")


@dataclass
class Report:
    """Tells the client what happens to one picture.

    Args:
        index: which picture.
        emit: takes the events.
        metrics: where the files' bytes are counted.
        sent_bytes: bytes of its file that have been told.
    """

    index: int
    emit: Emit
    metrics: Metrics
    sent_bytes: int = 0
    _reached: tuple[int, int] = (-1, -1)
    _previewed: int = 0

    def progress(self, stage: str, step: int, steps: int) -> None:
        """A step of a stage is done, unless the client knows of this one, or of a later one."""
        here = (_STAGES.index(stage), step)
        if here > self._reached:
            self._reached = here
            progress = GenerateProgress(image_index=self.index, stage=stage, step=step, steps=steps)
            self.emit(GenerateResponse(progress=progress))

    def queued(self, stage: str, position: int) -> None:
        """The picture waits for a stage."""
        queued = GenerateQueued(image_index=self.index, stage=stage, position=position)
        self.emit(GenerateResponse(queued=queued))

    def preview(self, preview: LatentPreview) -> None:
        """A small picture of the work in progress, unless the client has that of a later step."""
        if preview.step > self._previewed:
            self._previewed = preview.step
            shown = GeneratePreview(
                image_index=self.index, step=preview.step, data=preview.data, media_type=preview.media_type
            )
            self.emit(GenerateResponse(preview=shown))

    def chunk(self, chunk: FileChunk) -> None:
        """The next piece of the file; one at offset 0 begins it, again if there was one before."""
        chunk.file_index = self.index
        self.sent_bytes += len(chunk.data)
        self.metrics.file_bytes.inc(len(chunk.data))
        self.emit(GenerateResponse(chunk=chunk))
