"""Films in files: frames to MP4 or WebM, and back, by ffmpeg, which comes with `pip install 'safelight[video]'`."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.model_files import PathLike
from safelight.ppm import read_ppm

_CODECS = {
    ".mp4": ("-c:v", "libx264", "-crf", "18", "-movflags", "+faststart"),
    ".webm": ("-c:v", "libvpx-vp9", "-crf", "24", "-b:v", "0"),
}
# Every prediction is exact, in RGB; and the same frames make the same file.
_LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0", "-preset", "veryfast", "-threads", "4", "-fflags", "+bitexact")


class VideoReader(Sequence[Image.Image]):
    """The frames of a film, as Pillow's RGB pictures."""

    def __init__(self, frames: Iterable[Image.Image]) -> None:
        self.frames = list(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # a reader is not sliced
        return self.frames[index]


def save_video(frames: Sequence[Image.Image], save_path: PathLike, fps: float = 15) -> None:
    """Write frames of one size, width and height even, to an .mp4 (H.264) or .webm (VP9) file.

    The file is there when it is whole, or not at all.

    Raises:
        InvalidRequestError: the suffix stands for no format, there are no frames, or ffmpeg can't write them.
        UnsupportedError: there is no ffmpeg.
    """
    path = Path(save_path)
    if path.suffix not in _CODECS:
        raise InvalidRequestError.of("save_path", f"{path} ends in {path.suffix!r}; choose from {', '.join(_CODECS)}")
    given = _given("frames", frames, fps)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        _ffmpeg(
            ["-loglevel", "error", *given, *_CODECS[path.suffix], "-pix_fmt", "yuv420p", str(part)],
            (_rgb(frame) for frame in frames),
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def lossless_film(field: str, frames: Sequence[Image.Image], fps: float) -> bytes:
    """The file of a film that has the frames, as RGB, to the bit; `field` names them in errors.

    Raises:
        InvalidRequestError: they are no pictures, none at all, or of several sizes.
        UnsupportedError: there is no ffmpeg.
    """
    given = _given(field, frames, fps)
    film, _ = _ffmpeg(
        ["-loglevel", "error", *given, *_LOSSLESS, "-f", "matroska", "-"], (_rgb(frame) for frame in frames)
    )
    return film


def _given(field: str, frames: Sequence[Image.Image], fps: float) -> list[str]:
    """ffmpeg's arguments for frames that it is given one after the other."""
    if not all(isinstance(frame, Image.Image) for frame in frames):
        raise InvalidRequestError.of(field, "must be PIL pictures")
    if not frames or len({frame.size for frame in frames}) > 1:
        raise InvalidRequestError.of(field, "must be at least one, all of one size")
    width, height = frames[0].size
    return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]


def load_video(path: PathLike) -> VideoReader:
    """All frames of a film.

    Raises:
        InvalidRequestError: there is no such file, or it is no film.
        UnsupportedError: there is no ffmpeg.
    """
    if not Path(path).is_file():
        raise InvalidRequestError.of("path", f"{path} does not exist: correct the path")
    written = ["-fps_mode", "passthrough", "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
    data, _ = _ffmpeg(["-i", str(path), "-map", "0:V:0", *written])
    stream = io.BytesIO(data)
    return VideoReader(iter(lambda: read_ppm(stream), None))


def _rgb(frame: Image.Image) -> bytes:
    return frame.convert("RGB").tobytes()


def _ffmpeg(arguments: Sequence[str], frames: Iterable[bytes] = ()) -> tuple[bytes, str]:
    """Run ffmpeg on frames; returns what it writes to its output, and what it says.

    Raises:
        InvalidRequestError: it failed; its words are in the error.
        UnsupportedError: there is none.
    """
    done = subprocess.run(
        [_executable(), "-hide_banner", "-y", *arguments], input=b"".join(frames), capture_output=True, check=False
    )
    words = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0:
        raise InvalidRequestError.of("video", f"ffmpeg refused it: {words}")
    return done.stdout, words


def _executable() -> str:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise UnsupportedError("films need ffmpeg: pip install 'safelight[video]'") from error
    path: str = imageio_ffmpeg.get_ffmpeg_exe()
    return path
