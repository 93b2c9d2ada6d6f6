from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight import InvalidRequestError, load_video
from safelight.input_films import MAX_FILM_BYTES, film_file


def noise(count: int, size: tuple[int, int] = (37, 23)) -> list[Image.Image]:
    levels = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in levels]


def read_back(film: bytes, folder: Path) -> list[bytes]:
    (folder / "film.mkv").write_bytes(film)
    return [frame.tobytes() for frame in load_video(folder / "film.mkv")]


def test_frames_are_sent_to_the_bit_and_equal_frames_as_equal_files(tmp_path: Path) -> None:
    film = film_file("video", noise(6))
    assert read_back(film, tmp_path) == [frame.tobytes() for frame in noise(6)]
    assert film == film_file("video", noise(6))


def test_the_frames_of_another_mode_are_sent_as_rgb(tmp_path: Path) -> None:
    grey = [frame.convert("L") for frame in noise(2)]
    assert read_back(film_file("video", grey), tmp_path) == [frame.convert("RGB").tobytes() for frame in grey]


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"anything")
    assert film_file("video", path) == film_file("video", str(path)) == film_file("video", b"anything") == b"anything"


@pytest.mark.parametrize(
    ("film", "sentence"),
    [
        (7, "video: is a int; give PIL pictures, a film file's bytes, or its path"),
        ([], "video: must be at least one, all of one size"),
        ([1, 2], "video: must be PIL pictures"),
        ([*noise(1), *noise(1, (8, 8))], "video: must be at least one, all of one size"),
        ("nowhere.mp4", "video: nowhere.mp4 can't be read: No such file"),
        (bytes(MAX_FILM_BYTES + 1), "video: is a file of 67108865 bytes; at most 67108864 can be sent: shorten"),
    ],
    ids=["number", "none", "numbers", "sizes", "nowhere", "huge"],
)
def test_what_can_not_be_sent_is_refused(film: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        film_file("video", film)
