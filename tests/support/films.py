"""Small films: their frames, and the files that ffmpeg makes of them."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

LOSSLESS = (".mp4", "-c:v", "libx264rgb", "-qp", "0")
MP4 = (".mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "4", "-movflags", "+faststart")
WEBM = (".webm", "-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p")
GIF = (".gif",)


def moving_square(frames: int, size: tuple[int, int] = (64, 48)) -> Pixels:
    """A square that moves over a slope with a little noise, [T, H, W, 3]; size: width and height."""
    width, height = size
    film = np.random.default_rng(0).integers(0, 8, (frames, height, width, 3), dtype=np.uint8)
    film[..., 0] += np.linspace(40, 200, width, dtype=np.uint8)
    film[..., 1] += np.linspace(40, 200, height, dtype=np.uint8)[:, None]
    for number in range(frames):
        left = 2 * number % (width // 2)
        film[number, 4 : height // 2, left : left + width // 4] = (200, 60, 60)
    return film


def film_file(film: Pixels, how: tuple[str, ...] = LOSSLESS, fps: int = 16) -> bytes:
    """The file of frames [T, H, W, 3]; how: its suffix, and ffmpeg's options."""
    height, width = film.shape[1:3]
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    return made_by_ffmpeg([*given, *how[1:]], how[0], film.tobytes())


def made_by_ffmpeg(arguments: list[str], suffix: str, data: bytes = b"") -> bytes:
    """The file that ffmpeg makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film{suffix}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *arguments, str(path)]
        subprocess.run(command, input=data, check=True)
        return path.read_bytes()
