"""A film to start from, in the pipeline and on the command line, at a gateway of four services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safelight import Receipt, WanPipelineConfig, WanVideoPipeline, load_video, save_video
from safelight.cli import run
from tests.support.cluster import run_cluster
from tests.support.films import moving_square
from tests.support.tiny_wan import save_tiny_wan

FRAMES = [Image.fromarray(frame) for frame in moving_square(9, (80, 64))]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    (folder / "manifest.yaml").write_text(f"models:\n  - {{name: tiny, path: {save_tiny_wan(folder / 'tiny')}}}\n")
    return str(folder / "manifest.yaml")


@pytest.fixture
async def gateway(manifest: str) -> AsyncIterator[str]:
    async with run_cluster(manifest) as cluster:
        assert cluster.gateway is not None
        yield cluster.gateway.address


@pytest.fixture
def film(tmp_path: Path) -> Path:
    save_video(FRAMES, tmp_path / "film.mp4", fps=24)
    return tmp_path / "film.mp4"


async def remade(gateway: str, film: Any, **options: Any) -> list[bytes]:
    """The frames that the pipeline makes of a film."""

    def make() -> list[Image.Image]:
        with WanVideoPipeline.from_pretrained(WanPipelineConfig.basic_config("tiny", endpoint=gateway)) as pipeline:
            return pipeline("a cat", input_video=film, num_inference_steps=4, seed=1, **options)

    made = await asyncio.to_thread(make)
    assert {frame.size for frame in made} == {(80, 64)}
    return [frame.tobytes() for frame in made]


async def test_a_path_and_its_frames_make_the_same_film_and_no_strength_keeps_nothing(gateway: str, film: Path) -> None:
    of_path = await remade(gateway, film, denoising_strength=0.5)
    assert len(of_path) == 9
    assert of_path == await remade(gateway, load_video(film), denoising_strength=0.5)
    assert of_path == await remade(gateway, load_video(film).frames, denoising_strength=0.5)
    assert of_path != await remade(gateway, film)


async def test_as_many_of_the_first_frames_are_taken_as_asked_for(gateway: str) -> None:
    assert await remade(gateway, FRAMES, num_frames=5) == await remade(gateway, FRAMES[:5])


async def test_the_command_line_makes_a_film_of_a_film_and_replays_it(
    gateway: str, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def safelight(*arguments: str) -> int:
        return await asyncio.to_thread(run, [*arguments, "--endpoint", gateway])

    output, receipt = tmp_path / "made.mp4", str(tmp_path / "made.json")
    options = ["-o", str(output), "--receipt", receipt, "--video", str(film), "--strength", "0.7", "--steps", "3"]
    assert await safelight("generate", "a cat", "--determinism", "exact", *options) == 0
    known = await asyncio.to_thread(lambda: Receipt.from_json(Path(receipt).read_text()))
    assert (known.width, known.height, known.num_frames, known.fps, known.strength) == (80, 64, 9, 24.0, 0.7)
    assert len(load_video(output)) == 9
    assert await safelight("replay", receipt, "--video", str(film)) == 0
    assert "\nidentical: " in capsys.readouterr().out
    assert await safelight("replay", receipt) == 2
    wanted = f"--video: give the file that the picture started from, SHA-256 {known.inputs['video']}"
    assert wanted in capsys.readouterr().err
