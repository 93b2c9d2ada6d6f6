"""A denoiser that is led through keyframes: they lead, a checkpoint needs them again, bad ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from safelight.errors import FingerprintMismatchError, InvalidRequestError, NonFiniteError, UnsupportedError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from tests.support.running_denoiser import StartDenoiser, checkpoints_of, latents_of, relative_error
from tests.support.stage_requests import FILM_SHAPE as SHAPE
from tests.support.stage_requests import exact, inline, led_request, random, resumed, with_checkpoints
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v


@pytest.fixture(scope="module")
def tiny_manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is led through keyframes, one that is through two, and one that is through none."""
    folder = tmp_path_factory.mktemp("models")
    models: dict[str, Path] = {
        "led": save_tiny_wan_i2v(folder / "led"),
        "two": save_tiny_wan_i2v(folder / "two", pictures=2),
        "words": save_tiny_wan(folder / "words"),
    }
    entries = [{"name": name, "path": str(path)} for name, path in models.items()]
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"models": entries}))
    return str(folder / "manifest.yaml")


async def test_the_film_follows_the_pictures_their_places_and_their_embeddings(start: StartDenoiser) -> None:
    denoiser = await start()
    films = [
        await denoiser.latents(each)
        for each in (
            led_request(),
            led_request(),
            led_request(indices=(0, 4)),
            led_request(latents=torch.zeros(1, *SHAPE)),
        )
    ]
    assert torch.equal(films[0], films[1])
    assert all(relative_error(film, films[0]) > 1e-3 for film in films[2:])


async def test_a_request_resumed_elsewhere_brings_them_again_and_ends_bit_for_bit_the_same(
    start: StartDenoiser,
) -> None:
    here, there = await start(), await start(batch_cfg=False)
    asked = exact(led_request())
    events = await here.events(with_checkpoints(asked, 1))
    for checkpoint in checkpoints_of(events):
        assert torch.equal(await there.latents(resumed(asked, checkpoint)), latents_of(events))


async def test_a_warm_up_measures_models_that_need_keyframes(start: StartDenoiser) -> None:
    denoiser = await start(warm_up_steps=1, warm_up_seconds=0.01)
    assert (await denoiser.latents(led_request("two"))).shape == (1, *SHAPE)


@pytest.mark.parametrize("parallel", [{"cfg": 2, "ulysses": 2}, {"ring": 2}], ids=str)
async def test_ranks_that_share_the_tokens_make_the_film_of_one_process(
    start: StartDenoiser, tmp_path: Path, parallel: dict[str, int]
) -> None:
    folder, manifest = save_tiny_wan_i2v(tmp_path / "model"), tmp_path / "manifest.yaml"
    alone = {"name": "alone", "path": str(folder)}
    shared = {"name": "shared", "path": str(folder), "denoiser": {"parallel": parallel}}
    manifest.write_text(yaml.safe_dump({"models": [alone, shared]}))
    denoiser = await start(manifest=str(manifest))
    assert relative_error(*[await denoiser.latents(led_request(name)) for name in ("shared", "alone")]) < 1e-5


def changed(**fields: Any) -> DenoiseRequest:
    """The usual request with other fields; None takes one away."""
    made = led_request()
    for name, value in fields.items():
        made.ClearField(name)  # type: ignore[arg-type]  # any field
        if value is not None:
            made.MergeFrom(DenoiseRequest(**{name: value}))
    return made


def planned_with_another_decoder() -> DenoiseRequest:
    made = led_request()
    made.context.fingerprints["decoder"] = "another"
    made.keyframe_latents.header.fingerprint = "its own"
    return made


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (changed(keyframe_latents=None), InvalidRequestError, "keyframe_latents"),
        (changed(keyframe_indices=None), InvalidRequestError, "keyframe_indices"),
        (changed(keyframe_indices=[4, 4]), InvalidRequestError, "keyframe_indices"),
        (changed(keyframe_indices=[-1, 4]), InvalidRequestError, "keyframe_indices"),
        (changed(keyframe_indices=range(17)), InvalidRequestError, "1 to 16"),
        (changed(keyframe_indices=[0, 9]), InvalidRequestError, "last frame is 8"),
        (changed(keyframe_latents=inline(random(1, 16, 3, 4, 4))), InvalidRequestError, "keyframe_latents"),
        (led_request(latents=torch.full((1, *SHAPE), torch.nan)), NonFiniteError, "keyframe_latents"),
        (led_request("two", (0,)), InvalidRequestError, "must be 2 rising"),
        (led_request("two", pictures=1), InvalidRequestError, "image_embeds"),
        (led_request(pictures=0), InvalidRequestError, "image_embeds"),
        (led_request("words"), UnsupportedError, "keyframe_latents"),
        (changed(initial_latents=inline(random(1, *SHAPE))), UnsupportedError, "initial_latents"),
        (planned_with_another_decoder(), FingerprintMismatchError, "keyframe_latents"),
    ],
)
async def test_bad_keyframes_are_refused_by_name(
    start: StartDenoiser, bad: DenoiseRequest, kind: type[Exception], words: str
) -> None:
    error = await (await start()).failure(bad)
    assert isinstance(error, kind)
    assert words in str(error)
