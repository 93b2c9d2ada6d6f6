from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from safelight import InvalidRequestError, UnsupportedError, load_video, save_video
from safelight.utils import video

SIZE, COUNT = (48, 32), 7


def film() -> list[Image.Image]:
    """A square that moves over grey."""
    frames = [Image.new("RGB", SIZE, (90, 90, 90)) for _ in range(COUNT)]
    for number, frame in enumerate(frames):
        frame.paste((220, 40, 40), (4 * number, 8, 4 * number + 12, 24))
    return frames


@pytest.mark.parametrize("name", ["film.mp4", "film.webm"])
def test_a_film_comes_back_within_the_codecs_loss(name: str, tmp_path: Path) -> None:
    save_video(film(), tmp_path / name, fps=8)
    read = load_video(tmp_path / name)
    assert len(read) == len(read.frames) == COUNT
    assert read[0].size == SIZE
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in zip(read, film(), strict=True)]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 28
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_turned_film_is_read_upright(tmp_path: Path) -> None:
    save_video(film(), tmp_path / "film.mp4")
    turn = ["-display_rotation", "90", "-i", str(tmp_path / "film.mp4"), "-c", "copy", str(tmp_path / "turned.mp4")]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *turn], check=True)
    assert load_video(tmp_path / "turned.mp4")[0].size == SIZE[::-1]


def test_diffsynth_engines_place_has_the_same_functions() -> None:
    assert (video.save_video, video.load_video) == (save_video, load_video)


@pytest.mark.parametrize(
    ("frames", "name", "words"),
    [
        (film(), "film.avi", "choose from .mp4, .webm"),
        ([], "film.mp4", "at least one"),
        ([*film(), Image.new("RGB", (2, 2))], "film.mp4", "all of one size"),
        ([Image.new("RGB", (33, 31))], "film.mp4", "not divisible by 2"),
    ],
)
def test_what_can_not_be_written_is_refused_and_leaves_no_file(
    frames: list[Image.Image], name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        save_video(frames, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_film_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        load_video(tmp_path / "film.mp4")
    (tmp_path / "film.mp4").write_bytes(b"no film at all")
    with pytest.raises(InvalidRequestError, match="ffmpeg refused it"):
        load_video(tmp_path / "film.mp4")


def test_without_ffmpeg_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UnsupportedError, match=r"safelight\[video\]"):
        save_video(film(), tmp_path / "film.mp4")
