"""Film files that users upload: MP4, WebM and GIF, read by ffmpeg, and measured without decoding more than a frame."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg

from safelight.ppm import read_ppm

MAX_FILM_BYTES = 64 * 1024**2
"""Largest file, unless a setting says otherwise."""

MAX_FRAME_PIXELS = 16 * 1024**2
"""Most pixels of a frame, unless a setting says otherwise."""

FILE_NAME = "film"
"""What ffmpeg finds the file as, in the folder that it runs in."""

_THREADS = "4"
_MEASURING_SECONDS = 30.0
_WHO_SPEAKS = re.compile(r"^(\[[^]]* @ 0x[0-9a-f]+\] )+")  # before each of ffmpeg's sentences
_CUT_SHORT = ("File ended prematurely", "partial file")  # ffmpeg says so, and goes on as if nothing were
_DISCARDED = 0x4  # a packet's flag: decoded for those that follow, and never shown

# The demuxer is named, and only files are read: a playlist would have ffmpeg open what it names.
_DEMUXERS: Mapping[tuple[int, bytes], str] = {
    (4, b"ftyp"): "mov",
    (0, b"\x1a\x45\xdf\xa3"): "matroska",
    (0, b"GIF8"): "gif",
}


class FilmError(ValueError):
    """A film file that cannot be read; the message is the rest of a sentence that begins with its field."""


@dataclass(frozen=True)
class FilmFacts:
    """What a film file says of itself.

    Args:
        width: pixels, upright.
        height: the same.
        frames: how many there are.
        fps: frames per second, the mean where they differ; 0: it does not say.
    """

    width: int
    height: int
    frames: int
    fps: float


def reading_command(data: bytes, max_frame_pixels: int) -> list[str]:
    """ffmpeg's command line as far as it concerns the input: the file, which lies there as FILE_NAME.

    What is damaged is an error (-xerror), and not a guess.

    Raises:
        FilmError: by its first bytes it is none of the formats that are read.
    """
    given = ["-protocol_whitelist", "file", "-max_pixels", str(max_frame_pixels), "-threads", _THREADS]
    quiet = ["-nostdin", "-hide_banner", "-loglevel", "error", "-xerror"]
    return [imageio_ffmpeg.get_ffmpeg_exe(), *quiet, "-f", _demuxer(data), *given, "-i", FILE_NAME, "-map", "0:V:0"]


def fault_of(words: str, max_frame_pixels: int, where: str = "") -> str:
    """What is wrong with a film that ffmpeg failed on with these words, after the field's name; where: " after …"."""
    if "matches no streams" in words:
        return "has no frames in it: give a file with a video stream"
    if "exceeds specified max pixel count" in words:
        return f"has frames of more than {max_frame_pixels} pixels: scale it down"
    reason = _WHO_SPEAKS.sub("", (words.splitlines() or ["ffmpeg gave no reason"])[0])
    return f"is cut short or damaged{where}: encode it anew ({reason})"


def film_facts(data: bytes, max_frame_pixels: int = MAX_FRAME_PIXELS) -> FilmFacts:
    """Measure a film. Its first frame is decoded, and the others are counted.

    Raises:
        FilmError: it can't be read, or is cut short as far as its packets tell.
    """
    with tempfile.TemporaryDirectory(prefix="safelight-film-") as name:
        folder = Path(name)
        (folder / FILE_NAME).write_bytes(data)
        picture = ["-frames:v", "1", "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
        packets = ["-map", "0:V:0", "-c", "copy", "-f", "framecrc", "packets"]
        command = [*reading_command(data, max_frame_pixels), *picture, *packets]
        output, words = _run(command, folder, max_frame_pixels)
        first = read_ppm(io.BytesIO(output))
        if first is None or any(sign in words for sign in _CUT_SHORT):
            raise FilmError(fault_of(words, max_frame_pixels))
        frames, fps = _pace((folder / "packets").read_text())
        return FilmFacts(*first.size, frames, fps)


def _demuxer(data: bytes) -> str:
    for (start, signature), demuxer in _DEMUXERS.items():
        if data[start : start + len(signature)] == signature:
            return demuxer
    raise FilmError("must be an MP4, WebM or GIF file")


def _run(command: list[str], folder: Path, max_frame_pixels: int) -> tuple[bytes, str]:
    """What ffmpeg writes to its output, and what it says; it has succeeded."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=_MEASURING_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FilmError(f"took more than {_MEASURING_SECONDS:g} s to measure: make it smaller") from error
    words = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0:
        raise FilmError(fault_of(words, max_frame_pixels))
    return done.stdout, words


def _pace(packets: str) -> tuple[int, float]:
    """The frames that are shown, and how many in a second, of what ffmpeg's muxer "framecrc" writes of a stream.

    A line of it is: stream, time of decoding, of showing, duration, size, checksum, and flags where there are any.
    """
    lines = [line.split(",") for line in packets.splitlines() if not line.startswith("#")]
    shown = [line for line in lines if not _flags(line) & _DISCARDED]
    times = [(int(line[2]), int(line[3])) for line in shown]
    tick = next(Fraction(line.split(":")[1].strip()) for line in packets.splitlines() if line.startswith("#tb 0"))
    length = tick * (max(start + lasts for start, lasts in times) - min(start for start, _ in times)) if times else 0
    return len(shown), round(float(len(shown) / length), 3) if length > 0 else 0.0


def _flags(line: list[str]) -> int:
    flags = next((field.strip() for field in line[6:] if field.strip().startswith("F=")), "F=0x0")
    return int(flags[2:], 16)
