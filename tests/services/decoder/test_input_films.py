from __future__ import annotations

import io
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.errors import InternalError, InvalidRequestError
from services.decoder.input_films import FilmFile, film_pieces, keyframe_indices
from tests.support.films import GIF, LOSSLESS, MP4, WEBM, film_file, made_by_ffmpeg, moving_square

SIZE, FRAMES = (64, 48), 9
MOVING = moving_square(FRAMES, SIZE)


@pytest.fixture(autouse=True)
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where films lie while they are read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def opened(data: bytes, num_frames: int = FRAMES, max_frame_pixels: int = 40_000) -> FilmFile:
    return FilmFile(data, SIZE, num_frames, max_frame_pixels)


def read(film: FilmFile) -> torch.Tensor:
    try:
        return torch.stack(list(film.frames()))
    finally:
        film.discard()


@pytest.mark.parametrize("how", [LOSSLESS, MP4, WEBM, GIF], ids=["lossless", "mp4", "webm", "gif"])
def test_every_kind_of_film_is_read_and_leaves_nothing_behind(how: tuple[str, ...], films: Path) -> None:
    frames = read(opened(film_file(MOVING, how)))
    exact = torch.from_numpy(MOVING).permute(0, 3, 1, 2) / 127.5 - 1
    assert (frames - exact).abs().mean() < (1e-6 if how is LOSSLESS else 0.1)
    assert list(films.iterdir()) == []


def test_frames_are_those_that_the_file_has_however_long_each_is_shown() -> None:
    uneven = made_by_ffmpeg(
        ["-f", "lavfi", "-i", "testsrc=s=64x48:r=16:d=1", "-vf", "setpts=N*N/(16*TB)", "-fps_mode", "vfr"], ".mp4"
    )
    assert len(read(opened(uneven, num_frames=16))) == 16


def test_pieces_are_the_first_frame_and_then_as_many_as_make_a_latent_frame() -> None:
    pieces = film_pieces(iter(torch.zeros(9, 3, 2, 2)), 4)
    assert [len(piece) for piece in pieces] == [1, 4, 4]


@pytest.mark.parametrize(
    ("pictures", "indices"), [(1, [0]), (2, [0, 80]), (3, [0, 40, 80]), (4, [0, 26, 53, 80]), (81, [*range(81)])]
)
def test_keyframes_are_spread_over_the_film(pictures: int, indices: list[int]) -> None:
    assert keyframe_indices(pictures, 81) == indices


@pytest.mark.parametrize("num_frames", range(1, 82, 4))
def test_keyframes_never_share_a_frame(num_frames: int) -> None:
    for pictures in range(1, num_frames + 1):
        assert len(set(keyframe_indices(pictures, num_frames))) == pictures


def _cut(film: bytes) -> bytes:
    return film[: len(film) * 6 // 10]


def _damaged(film: bytes) -> bytes:
    start, end = len(film) // 2, len(film) * 3 // 4
    return film[:start] + bytes(each ^ 0x5A for each in film[start:end]) + film[end:]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("film", "field", "words"),
    [
        (b"\x00" * 100, "film", "must be an MP4, WebM or GIF"),
        (_png(), "film", "must be an MP4, WebM or GIF"),
        (b"#EXTM3U\n/etc/passwd\n", "film", "must be an MP4, WebM or GIF"),
        (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 100, "film", "cut short or damaged after 0 of 9"),
        (made_by_ffmpeg(["-f", "lavfi", "-i", "sine=d=0.1"], ".mp4"), "film", "no frames in it"),
        (_cut(film_file(MOVING, MP4)), "film", "cut short or damaged after"),
        (_cut(film_file(MOVING, WEBM)), "film", "cut short or damaged after"),
        (_cut(film_file(MOVING, GIF)), "film", "cut short or damaged after"),
        (_damaged(film_file(MOVING, MP4)), "film", "cut short or damaged after"),
        (film_file(MOVING[:8], MP4), "num_frames", "the film has 8 frames"),
        (film_file(moving_square(1, (256, 256)), MP4), "film", "more than 40000 pixels"),
    ],
    ids=[
        "zeros",
        "picture",
        "playlist",
        "no index",
        "sound",
        "cut mp4",
        "cut webm",
        "cut gif",
        "damaged",
        "short",
        "huge frames",
    ],
)
def test_a_film_that_can_not_be_read_is_an_error_of_its_field(film: bytes, field: str, words: str, films: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(opened(film))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert words in str(caught.value)
    assert list(films.iterdir()) == []


def test_a_film_is_read_no_faster_than_it_is_taken_and_can_be_stopped_meanwhile(films: Path) -> None:
    film = opened(film_file(np.repeat(MOVING, 60, axis=0)), num_frames=540)
    frames = film.frames()
    next(frames)
    stopper = threading.Thread(target=film.stop)
    stopper.start()
    stopper.join()
    with pytest.raises(InternalError, match="ended by signal 9"):
        list(frames)
    film.discard()
    assert list(films.iterdir()) == []


def test_a_film_that_is_stopped_before_it_starts_is_not_read(films: Path) -> None:
    film = opened(film_file(MOVING))
    film.stop()
    with pytest.raises(InternalError, match="ended by signal 9"):
        read(film)
    assert list(films.iterdir()) == []
