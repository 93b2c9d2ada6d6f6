"""Films of pictures by the pipeline and the command line: of one picture, several, none, and the wrong ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image, ImageChops

from safelight import InvalidRequestError, WanPipelineConfig, WanVideoPipeline
from safelight.cli import run
from safelight.pipelines.config import manifest_entry
from tests.support.cluster import run_cluster
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v

SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "seed": 1, "width": 64, "height": 80}
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    models = {
        "i2v": save_tiny_wan_i2v(folder / "i2v"),
        "flf2v": save_tiny_wan_i2v(folder / "flf2v", pictures=2),
        "t2v": save_tiny_wan(folder / "t2v"),
    }
    entries = [{"name": name, "path": str(path)} for name, path in models.items()]
    (folder / "manifest.yaml").write_text(json.dumps({"models": entries}))
    return str(folder / "manifest.yaml")


async def at_gateway(manifest: str, use: Callable[[str], Result]) -> Result:
    """What a blocking function makes of a gateway's address."""
    async with run_cluster(manifest) as cluster:
        assert cluster.gateway is not None
        return await asyncio.to_thread(use, cluster.gateway.address)


def pipeline_of(name: str, endpoint: str) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(WanPipelineConfig(name, endpoint=endpoint))


def picture(seed: int, size: tuple[int, int] = (64, 80)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def difference(one: list[Image.Image], other: list[Image.Image]) -> int:
    """The largest, in levels."""
    return max(max(ImageChops.difference(*pair).tobytes()) for pair in zip(one, other, strict=True))


async def test_a_picture_or_a_list_of_them_leads_the_film(manifest: str) -> None:
    def films(endpoint: str) -> list[list[Image.Image]]:
        three = [picture(seed) for seed in range(3)]
        with pipeline_of("i2v", endpoint) as pipe:
            made = [pipe("a cat", input_image=given, **SMALL) for given in (three[0], three[:1], three, three[1])]
            return [*made, pipe("a cat", "", three[0], None, 1.0, 1, 80, 64, 5, None, 2, None)]

    alone, listed, three, other, by_position = await at_gateway(manifest, films)
    assert [frame.size for frame in alone] == [(64, 80)] * 5
    assert max(difference(alone, listed), difference(alone, by_position)) <= 1
    assert min(difference(alone, three), difference(alone, other)) > 1


async def test_with_one_side_alone_the_film_has_the_first_pictures_proportions(manifest: str) -> None:
    def film(endpoint: str) -> list[Image.Image]:
        with pipeline_of("i2v", endpoint) as pipe:
            return pipe("a cat", input_image=[picture(0, (30, 60)), picture(1)], **{**SMALL, "height": None})

    assert (await at_gateway(manifest, film))[0].size == (64, 128)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("i2v", {}, "inputs: have 0 images; a film of model 'i2v' is led through 1 to 16"),
    ("i2v", {"input_image": [picture(0)] * 17}, "have 17 images"),
    ("i2v", {"input_image": [picture(0), "no.png"]}, "image[1]: no.png can't be read"),
    ("i2v", {"input_image": b"no picture"}, "inputs[0].data"),
    ("i2v", {"input_image": picture(0), "input_video": [picture(0)] * 5}, "MEDIA_ROLE_VIDEO"),
    ("flf2v", {"input_image": picture(0)}, "have 1 images; a film of model 'flf2v' is led through 2"),
    ("t2v", {"input_image": picture(0)}, "inputs[0].role: is MEDIA_ROLE_IMAGE"),
]


async def test_the_wrong_pictures_are_refused_by_name(manifest: str) -> None:
    def refusals(endpoint: str) -> list[str]:
        found = []
        for model, given, _ in WRONG:
            with pipeline_of(model, endpoint) as pipe, pytest.raises(InvalidRequestError) as caught:
                pipe("a cat", **given, **SMALL)
            found.append(str(caught.value))
        return found

    for said, (*_, words) in zip(await at_gateway(manifest, refusals), WRONG, strict=True):
        assert words in said


def test_the_config_s_image_encoder_is_a_part_of_the_encoder(tmp_path: Path) -> None:
    for name in ("dit.safetensors", "clip.safetensors"):
        (tmp_path / name).touch()
    config = WanPipelineConfig.basic_config(tmp_path / "dit.safetensors", tmp_path / "clip.safetensors", "cpu", 1)
    config.image_encoder_dtype = "float32"
    entry = manifest_entry(config)
    assert entry is not None
    part = entry["encoder"]["parts"]["image_encoder"]
    assert part == {"dtype": "float32", "path": [str(tmp_path / "clip.safetensors")]}


async def test_the_command_line_takes_several_pictures_and_replays_them(
    manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last, receipt = (str(tmp_path / name) for name in ("a.png", "b.png", "film.json"))
    picture(0).save(first)
    picture(1).save(last)
    options = ["--frames", "5", "--steps", "2", "--width", "64", "--height", "80", "--determinism", "exact"]
    both = ["--image", first, "--image", last]
    wrong = [
        (["--image", last, "--image", first], "; give the file that the picture started from, "),
        (["--image", first], "--image: give the file that the picture started from, SHA-256 "),
        ([*both, "--image", first], "--image: the picture started from 2; leave it out"),
    ]

    def use(endpoint: str) -> None:
        made = ["-o", str(tmp_path / "film.mp4"), "--receipt", receipt, "--model", "flf2v", "--endpoint", endpoint]
        assert run(["generate", "a cat", *made, *both, *options]) == 0
        assert run(["replay", receipt, "--endpoint", endpoint, *both]) == 0
        assert "\nidentical: " in capsys.readouterr().out
        assert sorted(json.loads(Path(receipt).read_text())["inputs"]) == ["image", "image-2"]
        for files, words in wrong:
            assert run(["replay", receipt, "--endpoint", endpoint, *files]) == 2
            assert words in capsys.readouterr().err

    await at_gateway(manifest, use)
