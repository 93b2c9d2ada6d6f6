from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from services.common.uploaded_films import FilmError, FilmFacts, fault_of, film_facts
from tests.support.films import GIF, LOSSLESS, MP4, WEBM, film_file, made_by_ffmpeg, moving_square

MOVING = moving_square(20, (64, 48))


@pytest.fixture(autouse=True)
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where films lie while they are measured."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("how", [LOSSLESS, MP4, WEBM, GIF], ids=["lossless", "mp4", "webm", "gif"])
def test_a_film_says_its_size_its_length_and_its_speed(how: tuple[str, ...], films: Path) -> None:
    facts = film_facts(film_file(MOVING, how, fps=10))
    assert facts == FilmFacts(64, 48, 20, facts.fps)
    assert facts.fps == pytest.approx(10.0, rel=0.01)
    assert list(films.iterdir()) == []


def test_a_film_is_measured_upright(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(film_file(MOVING, MP4))
    turned = made_by_ffmpeg(["-display_rotation", "90", "-i", str(tmp_path / "film.mp4"), "-c", "copy"], ".mp4")
    facts = film_facts(turned)
    assert (facts.width, facts.height) == (48, 64)


def test_frames_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(film_file(MOVING, (*MP4, "-g", "30"), fps=10))
    begun_later = made_by_ffmpeg(["-ss", "1", "-i", str(tmp_path / "film.mp4"), "-c", "copy"], ".mp4")
    assert film_facts(begun_later).frames == 10


def test_the_speed_of_uneven_frames_is_their_mean() -> None:
    uneven = ["-f", "lavfi", "-i", "testsrc=s=64x48:r=16:d=1", "-vf", "setpts=N*N/(16*TB)", "-fps_mode", "vfr"]
    facts = film_facts(made_by_ffmpeg(uneven, ".mp4"))
    assert facts.frames == 16
    assert facts.fps == pytest.approx(16 / (15**2 / 16), rel=0.1)


def _cut(film: bytes) -> bytes:
    return film[: len(film) * 6 // 10]


@pytest.mark.parametrize(
    ("film", "words"),
    [
        (b"", "must be an MP4, WebM or GIF file"),
        (b"#EXTM3U\n/etc/passwd\n", "must be an MP4, WebM or GIF file"),
        (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 100, "is cut short or damaged"),
        (_cut(film_file(MOVING, MP4)), "is cut short or damaged"),
        (_cut(film_file(MOVING, WEBM)), "is cut short or damaged"),
        (made_by_ffmpeg(["-f", "lavfi", "-i", "sine=d=0.1"], ".mp4"), "has no frames in it"),
        (film_file(moving_square(1, (256, 256)), MP4), "has frames of more than 40000 pixels"),
    ],
    ids=["nothing", "playlist", "no index", "cut mp4", "cut webm", "sound", "huge frames"],
)
def test_a_film_that_can_not_be_measured_is_an_error(film: bytes, words: str, films: Path) -> None:
    with pytest.raises(FilmError, match=words):
        film_facts(film, max_frame_pixels=40_000)
    assert list(films.iterdir()) == []


def test_the_reason_is_ffmpegs_first_sentence() -> None:
    words = "[h264 @ 0x55] [IMGUTILS @ 0x7f] a bad thing\n[in#0 @ 0x55] another"
    assert fault_of(words, 1, " after 3 of 9 frames") == (
        "is cut short or damaged after 3 of 9 frames: encode it anew (a bad thing)"
    )
