"""From a film's frames, which come piece by piece, to its file: MP4, WebM and GIF by ffmpeg, or a ZIP archive of PNGs.

A film is written while it is decoded, so neither its frames nor its file are ever in memory as a whole. ffmpeg comes
with `imageio-ffmpeg`, reads the frames from a pipe and writes into a folder of the film's own.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight.errors import InternalError
from safelight.v1 import work_pb2 as pb

DEFAULT_QUALITY = 75
_FORMAT_OF_FRAMES = "frame_{:05d}.png"
_METADATA_NAME = "parameters.txt"
_THREADS = ("-threads", "4")  # a fixed number: the file's bytes follow it, and shall not follow the machine

Pixels = NDArray[np.uint8]


class FilmWriter(Protocol):
    """Writes one film; its methods are called one after the other, on any thread, and may take a while."""

    media_type: str

    def add(self, frames: Pixels) -> None:
        """The next frames, levels [T, H, W, 3]."""
        ...

    def finish(self) -> BinaryIO:
        """The film's file, to be read until `discard`; nothing may be added any more."""
        ...

    def discard(self) -> None:
        """Leave nothing behind; may be repeated, and follows `finish` as well."""
        ...


@dataclass(frozen=True)
class FilmCodec:
    """How ffmpeg writes a format.

    Args:
        suffix: of the file.
        media_type: of the file.
        codec: ffmpeg's name of it.
        pixel_format: that its players expect.
        options: of ffmpeg.
        quality_range: constant rate factors of the worst and the best quality; None: it takes none.
    """

    suffix: str
    media_type: str
    codec: str
    pixel_format: str
    options: tuple[str, ...]
    quality_range: tuple[int, int] | None

    def arguments(self, quality: int, comment: str) -> list[str]:
        """ffmpeg's further arguments. quality: 1 to 100; comment: text to embed."""
        factor = [] if self.quality_range is None else ["-crf", str(_between(self.quality_range, quality))]
        return [*self.options, *factor, *(["-metadata", f"comment={comment}"] if comment else [])]


CODECS: Mapping[pb.OutputFormat.ValueType, FilmCodec] = {
    # The index goes to the front, so that a browser plays the film while it loads.
    pb.OUTPUT_FORMAT_MP4: FilmCodec(
        ".mp4", "video/mp4", "libx264", "yuv420p", (*_THREADS, "-movflags", "+faststart"), (51, 0)
    ),
    pb.OUTPUT_FORMAT_WEBM: FilmCodec(".webm", "video/webm", "libvpx-vp9", "yuv420p", (*_THREADS, "-b:v", "0"), (63, 0)),
    # A palette for each frame: one for the whole film would need all of it at once.
    pb.OUTPUT_FORMAT_GIF: FilmCodec(
        ".gif",
        "image/gif",
        "gif",
        "pal8",
        ("-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"),
        None,
    ),
}


class FfmpegWriter:
    """A film by ffmpeg.

    Args:
        codec: how it is written.
        size: width and height in pixels; for MP4 and WebM both must be even.
        fps: frames per second.
        quality: 1 to 100.
        comment: text to embed; GIF has no place for it.
    """

    def __init__(self, codec: FilmCodec, size: tuple[int, int], fps: float, quality: int, comment: str) -> None:
        self.media_type = codec.media_type
        self._folder = Path(tempfile.mkdtemp(prefix="safelight-film-"))
        self._file, self._log = self._folder / f"film{codec.suffix}", self._folder / "log"
        width, height = size
        given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
        written = ["-c:v", codec.codec, "-pix_fmt", codec.pixel_format, *codec.arguments(quality, comment)]
        self._arguments = ["-loglevel", "error", *given, *written, str(self._file)]
        self._process: subprocess.Popen[bytes] | None = None
        self._written: BinaryIO | None = None

    def add(self, frames: Pixels) -> None:
        try:
            _pipe(self._started()).write(np.ascontiguousarray(frames).data)
        except BrokenPipeError as error:
            raise self._failure() from error

    def finish(self) -> BinaryIO:
        process = self._started()
        try:
            _pipe(process).close()
        except BrokenPipeError as error:
            raise self._failure() from error
        if process.wait() != 0:
            raise self._failure()
        self._written = self._file.open("rb")
        return self._written

    def discard(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # what was not written yet is not wanted any more
                _pipe(self._process).close()
        if self._written is not None:
            self._written.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self) -> subprocess.Popen[bytes]:
        """ffmpeg, which starts with the first frames."""
        if self._process is None:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), *self._arguments]
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
        return self._process

    def _failure(self) -> InternalError:
        self._started().wait()
        words = self._log.read_text(errors="replace").strip()
        return InternalError(f"ffmpeg could not write the film: {words or 'it gave no reason'}")


class FramesWriter:
    """A ZIP archive of PNG files, stored as they are; `comment`, if not empty, is a text file beside them."""

    media_type = "application/zip"

    def __init__(self, comment: str) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="safelight-film-")  # noqa: SIM115 - closed by `discard`
        self._archive = zipfile.ZipFile(self._file, "w")
        self._count = 0
        if comment:
            self._archive.writestr(_METADATA_NAME, comment)

    def add(self, frames: Pixels) -> None:
        for frame in frames:
            data = io.BytesIO()
            Image.fromarray(frame).save(data, "PNG")
            self._archive.writestr(_FORMAT_OF_FRAMES.format(self._count), data.getvalue())
            self._count += 1

    def finish(self) -> BinaryIO:
        self._archive.close()
        self._file.seek(0)
        return self._file

    def discard(self) -> None:
        self._archive.close()
        self._file.close()


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


FILM_FORMATS = (*CODECS, pb.OUTPUT_FORMAT_PNG_FRAMES)


def open_film_writer(output: pb.OutputOptions, size: tuple[int, int], fps: float, comment: str) -> FilmWriter:
    """A writer of the format that the options ask for, or of MP4. size: width and height; comment: text to embed."""
    if output.format == pb.OUTPUT_FORMAT_PNG_FRAMES:
        return FramesWriter(comment)
    codec = CODECS[output.format or pb.OUTPUT_FORMAT_MP4]
    return FfmpegWriter(codec, size, fps, output.quality or DEFAULT_QUALITY, comment)


def _between(factors: tuple[int, int], quality: int) -> int:
    """The constant rate factor of a quality from 1 to 100."""
    worst, best = factors
    return round(worst + (best - worst) * quality / 100)
