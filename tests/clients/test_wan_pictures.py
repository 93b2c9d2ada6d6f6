"""Films of pictures by the pipeline and the command line: of one picture, several, none, and the wrong ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from safelight import EmbeddedStack, InvalidRequestError, WanPipelineConfig, WanVideoPipeline
from safelight.cli import run
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v
from tests.support.wan_layout import save_original_clip

FILM: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "seed": 1}
SMALL: dict[str, Any] = {**FILM, "width": 64, "height": 80}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "i2v": save_tiny_wan_i2v(folder / "i2v"),
        "flf2v": save_tiny_wan_i2v(folder / "flf2v", pictures=2),
        "t2v": save_tiny_wan(folder / "t2v"),
    }


@pytest.fixture(scope="module")
def endpoint(models: dict[str, Path]) -> Iterator[str]:
    """A stack that serves all three."""
    entries = [{"name": name, "path": str(path)} for name, path in models.items()]
    with EmbeddedStack(entries, device="cpu", warm_up_steps=0) as stack:
        yield stack.endpoint


def pipeline_of(name: str, endpoint: str) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(WanPipelineConfig(name, endpoint=endpoint))


def picture(seed: int, size: tuple[int, int] = (64, 80)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def difference(one: list[Image.Image], other: list[Image.Image]) -> int:
    """The largest, in levels."""
    return max(max(ImageChops.difference(*pair).tobytes()) for pair in zip(one, other, strict=True))


def test_a_picture_or_a_list_of_them_leads_the_film(endpoint: str) -> None:
    with pipeline_of("i2v", endpoint) as pipe:
        alone, listed, three, other = (
            pipe("a cat", input_image=given, **SMALL)
            for given in (picture(0), [picture(0)], [picture(seed) for seed in range(3)], picture(1))
        )
    assert [frame.size for frame in alone] == [(64, 80)] * 5
    assert difference(alone, listed) <= 1
    assert difference(alone, three) > 1
    assert difference(alone, other) > 1


def test_positional_arguments_are_those_of_the_peer(models: dict[str, Path], endpoint: str, tmp_path: Path) -> None:
    file = save_original_clip(models["i2v"] / "image_encoder", tmp_path / "clip.safetensors")
    config = WanPipelineConfig.basic_config(models["i2v"], file, "cpu", 1, None, False)
    with WanVideoPipeline.from_pretrained(config) as named:
        frames = named("a cat", "", picture(0), None, 1.0, 1, 80, 64, 5, None, 2, None)
    with pipeline_of("i2v", endpoint) as of_folder:
        assert difference(frames, of_folder("a cat", input_image=picture(0), **SMALL)) <= 1


def test_without_a_size_the_film_has_the_first_pictures_proportions(endpoint: str) -> None:
    with pipeline_of("i2v", endpoint) as pipe:
        frames = pipe("a cat", input_image=[picture(0, (30, 60)), picture(1)], width=64, **FILM)
    assert frames[0].size == (64, 128)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("i2v", {}, "inputs: have 0 images; a film of model 'i2v' is led through 1 to 16"),
        ("i2v", {"input_image": [picture(0)] * 17}, "have 17 images"),
        ("i2v", {"input_image": [picture(0), "no.png"]}, r"image\[1\]: no.png can't be read"),
        ("i2v", {"input_image": b"no picture"}, r"inputs\[0\].data"),
        ("flf2v", {"input_image": picture(0)}, "have 1 images; .* is led through 2"),
        ("t2v", {"input_image": picture(0)}, r"inputs\[0\].role: is MEDIA_ROLE_IMAGE"),
        ("i2v", {"input_image": picture(0), "input_video": [picture(0)] * 5}, "MEDIA_ROLE_VIDEO"),
    ],
)
def test_the_wrong_pictures_are_refused_by_name(model: str, given: dict[str, Any], words: str, endpoint: str) -> None:
    with pipeline_of(model, endpoint) as pipe, pytest.raises(InvalidRequestError, match=words):
        pipe("a cat", **given, **SMALL)


def test_the_command_line_takes_several_pictures_and_replays_them(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last, film, receipt = (str(tmp_path / name) for name in ("a.png", "b.png", "film.mp4", "film.json"))
    picture(0).save(first)
    picture(1).save(last)
    options = ["--frames", "5", "--steps", "2", "--width", "64", "--height", "80", "--determinism", "exact"]
    pictures = ["--image", first, "--image", last]
    at = ["--model", "flf2v", "--endpoint", endpoint]
    assert run(["generate", "a cat", "-o", film, "--receipt", receipt, *pictures, *options, *at]) == 0
    assert run(["replay", receipt, "--endpoint", endpoint, *pictures]) == 0
    assert "\nidentical: " in capsys.readouterr().out
    assert sorted(json.loads(Path(receipt).read_text())["inputs"]) == ["image", "image-2"]
    for wrong, words in (
        (["--image", last, "--image", first], "--image: "),
        (["--image", first], "--image: give the file that the picture started from, SHA-256 "),
        ([*pictures, "--image", first], "--image: the picture started from 2; leave it out"),
    ):
        assert run(["replay", receipt, "--endpoint", endpoint, *wrong]) == 2
        assert words in capsys.readouterr().err
