from __future__ import annotations

import io
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from safelight.errors import InternalError
from safelight.v1 import work_pb2 as pb
from services.decoder.film_files import Pixels, open_film_writer

SIZE, FPS, FRAMES = (64, 48), 12.0, 9


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _film() -> Pixels:
    """A square that moves over a slope, [T, H, W, 3]."""
    width, height = SIZE
    film = np.zeros((FRAMES, height, width, 3), np.uint8)
    film[..., 0] = np.linspace(40, 200, width, dtype=np.uint8)
    film[..., 1] = np.linspace(40, 200, height, dtype=np.uint8)[:, None]
    for number in range(FRAMES):
        film[number, 8:24, 4 * number : 4 * number + 16] = (200, 60, 60)
    return film


def _write(file_format: pb.OutputFormat.ValueType, quality: int = 0, comment: str = "") -> bytes:
    return _write_film(_film(), pb.OutputOptions(format=file_format, quality=quality), comment)


def _write_film(film: Pixels, output: pb.OutputOptions, comment: str = "") -> bytes:
    writer = open_film_writer(output, (film.shape[2], film.shape[1]), FPS, comment)
    try:
        for piece in (film[:1], film[1:5], film[5:]):
            writer.add(piece)
        return writer.finish().read()
    finally:
        writer.discard()


def _ffmpeg(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], capture_output=True, check=True)


def _read(data: bytes, path: Path) -> tuple[str, Pixels]:
    """What ffmpeg says of a film's file, and its frames."""
    path.write_bytes(data)
    read = _ffmpeg("-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return read.stderr.decode(), np.frombuffer(read.stdout, np.uint8).reshape(-1, SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize(
    ("file_format", "suffix", "codec", "least_psnr"),
    [
        (pb.OUTPUT_FORMAT_UNSPECIFIED, ".mp4", "h264", 30.0),
        (pb.OUTPUT_FORMAT_MP4, ".mp4", "h264", 30.0),
        (pb.OUTPUT_FORMAT_WEBM, ".webm", "vp9", 30.0),
        (pb.OUTPUT_FORMAT_GIF, ".gif", "gif", 25.0),
    ],
)
def test_a_film_plays_with_its_frames_its_size_and_its_speed(
    file_format: pb.OutputFormat.ValueType, suffix: str, codec: str, least_psnr: float, tmp_path: Path
) -> None:
    facts, frames = _read(_write(file_format), tmp_path / f"film{suffix}")
    assert re.search(rf"Video: {codec}\b.* {SIZE[0]}x{SIZE[1]}", facts)
    found = re.search(r"([\d.]+) fps", facts)
    assert found is not None
    assert float(found[1]) == pytest.approx(FPS, rel=0.05)  # a GIF counts in hundredths of a second
    assert len(frames) == FRAMES
    error = np.mean((frames.astype(float) - _film()) ** 2)
    assert 10 * np.log10(255**2 / error) >= least_psnr


def test_frames_in_an_archive_are_the_frames_to_the_bit() -> None:
    archive = zipfile.ZipFile(io.BytesIO(_write(pb.OUTPUT_FORMAT_PNG_FRAMES, comment="a cat")))
    names = [name for name in archive.namelist() if name.endswith(".png")]
    assert archive.read("parameters.txt") == b"a cat"
    frames = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    assert np.array_equal(np.stack(frames), _film())


@pytest.mark.parametrize("file_format", [pb.OUTPUT_FORMAT_MP4, pb.OUTPUT_FORMAT_WEBM])
def test_a_lower_quality_makes_a_smaller_file(file_format: pb.OutputFormat.ValueType) -> None:
    assert len(_write(file_format, quality=10)) < len(_write(file_format, quality=95))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_parameters_are_in_the_file(suffix: str, tmp_path: Path) -> None:
    file_format = {".mp4": pb.OUTPUT_FORMAT_MP4, ".webm": pb.OUTPUT_FORMAT_WEBM}[suffix]
    comment = 'a "cat"; with = signs\nSteps: 20, Seed: 7'
    (tmp_path / f"film{suffix}").write_bytes(_write(file_format, comment=comment))
    metadata = _ffmpeg("-i", str(tmp_path / f"film{suffix}"), "-f", "ffmetadata", "-").stdout.decode()
    unescaped = metadata.replace("\\\n", "\n").replace("\\", "")
    assert comment in unescaped


@pytest.mark.parametrize("file_format", [pb.OUTPUT_FORMAT_MP4, pb.OUTPUT_FORMAT_PNG_FRAMES])
def test_a_film_that_is_given_up_leaves_nothing_behind(file_format: pb.OutputFormat.ValueType, tmp_path: Path) -> None:
    writer = open_film_writer(pb.OutputOptions(format=file_format), SIZE, FPS, "")
    writer.add(_film()[:3])
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_can_not_write_is_an_error_with_its_reason() -> None:
    film = np.zeros((200, 47, 63, 3), np.uint8)
    with pytest.raises(InternalError, match="not divisible by 2"):
        _write_film(film, pb.OutputOptions(format=pb.OUTPUT_FORMAT_MP4))
