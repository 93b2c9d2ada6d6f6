"""A denoiser that begins with a picture: how far it changes it, what it keeps, resumption, company and bad input."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from safelight.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    NonFiniteError,
    SafelightError,
)
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.tensor_pb2 import TensorLease
from services.denoiser.models.scheduler_config import STABLE_DIFFUSION_SAMPLERS
from tests.support.running_denoiser import StartDenoiser, checkpoints_of, latents_of, relative_error
from tests.support.stage_requests import (
    denoise_request,
    exact,
    from_picture,
    inline,
    resumed,
    with_checkpoints,
)

STEPS = 6
PICTURE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LEFT = (torch.arange(8) < 4).float().expand(1, 1, 8, 8).contiguous()


def progress_of(events: list[DenoiseResponse]) -> list[tuple[int, int]]:
    return [(event.progress.step, event.progress.steps) for event in events if event.HasField("progress")]


def image_to_image(strength: float = 0.5, sampler: str = "euler") -> DenoiseRequest:
    return from_picture(denoise_request(steps=STEPS, sampler=sampler), PICTURE, strength)


def inpaint(strength: float = 1.0, sampler: str = "euler", seed: int = 0) -> DenoiseRequest:
    return from_picture(denoise_request(seed=seed, steps=STEPS, sampler=sampler), PICTURE, strength, LEFT)


@pytest.mark.parametrize(("strength", "run"), [(0.0, 1), (0.1, 1), (0.5, 4), (0.7, 5), (1.0, 6)])
async def test_the_strength_says_how_many_steps_are_run_and_progress_counts_those(
    start: StartDenoiser, strength: float, run: int
) -> None:
    events = await (await start()).events(image_to_image(strength))
    assert progress_of(events) == [(step, run) for step in range(1, run + 1)]
    assert events[-1].result.steps_run == run


async def test_the_weaker_the_change_the_nearer_the_picture(start: StartDenoiser) -> None:
    denoiser = await start()
    distances = [
        float((await denoiser.latents(image_to_image(strength)) - PICTURE).abs().mean()) for strength in (0, 0.5, 1)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION_SAMPLERS)
async def test_what_the_mask_keeps_is_kept(start: StartDenoiser, sampler: str) -> None:
    latents = await (await start()).latents(inpaint(sampler=sampler))
    torch.testing.assert_close(latents[..., 4:], PICTURE[..., 4:], rtol=1e-6, atol=1e-6)
    assert (latents[..., :4] - PICTURE[..., :4]).abs().mean() > 0.05


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("make", [image_to_image, inpaint])
async def test_a_request_resumed_elsewhere_at_any_step_ends_bit_for_bit_the_same(
    start: StartDenoiser, make: Callable[..., DenoiseRequest], sampler: str
) -> None:
    here, there = await start(), await start(batch_cfg=False)
    request = exact(make(0.9, sampler))
    events = await here.events(with_checkpoints(request, every_steps=1))
    points = checkpoints_of(events)
    assert len(points) > 2
    for point in points:
        assert torch.equal(await there.latents(resumed(request, point)), latents_of(events))


async def test_a_picture_that_nothing_is_kept_of_is_not_needed_to_resume(start: StartDenoiser) -> None:
    denoiser = await start()
    events = await denoiser.events(with_checkpoints(image_to_image(), every_steps=1))
    request = resumed(image_to_image(), checkpoints_of(events)[0])
    request.initial_latents.lease.CopyFrom(TensorLease(endpoint=denoiser.server.address, ticket="gone"))
    assert torch.equal(await denoiser.latents(request), latents_of(events))


async def test_requests_with_and_without_masks_share_passes_and_equal_their_solo_runs(start: StartDenoiser) -> None:
    denoiser = await start()
    requests = [denoise_request(seed=1, steps=STEPS), image_to_image(0.9), inpaint(), inpaint(0.8, seed=3)]
    alone = [await denoiser.latents(request) for request in requests]
    together = await asyncio.gather(*(denoiser.events(request) for request in requests))
    errors = [relative_error(latents_of(ours), solo) for ours, solo in zip(together, alone, strict=True)]
    assert max(errors) < 1e-5
    assert max(event.progress.batch_size for events in together for event in events) > 1


async def test_yielding_the_device_changes_nothing(start: StartDenoiser) -> None:
    denoiser = await start(max_running=1)
    alone = await denoiser.latents(inpaint())
    hurried = denoise_request(seed=9, steps=2)
    hurried.context.priority = 100
    together = await asyncio.gather(denoiser.latents(inpaint()), denoiser.latents(hurried))
    assert relative_error(together[0], alone) < 1e-5


def masked(mask: Tensor) -> DenoiseRequest:
    return from_picture(denoise_request(), PICTURE, 1.0, mask)


def without_picture() -> DenoiseRequest:
    request = denoise_request()
    request.strength = 0.5
    request.mask.CopyFrom(inline(LEFT))
    return request


def of_other_weights() -> DenoiseRequest:
    request = image_to_image()
    request.context.fingerprints["decoder"] = "ours"
    request.initial_latents.header.fingerprint = "another"
    return request


BAD: dict[str, tuple[Callable[[], DenoiseRequest], type[SafelightError], str]] = {
    "strength above 1": (lambda: image_to_image(1.7), InvalidRequestError, "strength: is 1.7; must be from 0 to 1"),
    "strength nan": (lambda: image_to_image(float("nan")), InvalidRequestError, "strength: is nan"),
    "no picture": (without_picture, InvalidRequestError, "strength: needs initial_latents"),
    "picture of another size": (
        lambda: from_picture(denoise_request(), torch.zeros(1, 4, 8, 16), 0.5),
        InvalidRequestError,
        "initial_latents: is [1, 4, 8, 16] of dtype 1; must be [1, 4, 8, 8] of float32",
    ),
    "picture in float16": (
        lambda: from_picture(denoise_request(), PICTURE.half(), 0.5),
        InvalidRequestError,
        "initial_latents: is [1, 4, 8, 8] of dtype 2",
    ),
    "picture that is not finite": (
        lambda: from_picture(denoise_request(), PICTURE / 0, 0.5),
        NonFiniteError,
        "initial_latents is not finite",
    ),
    "mask of another size": (lambda: masked(torch.ones(1, 1, 8, 4)), InvalidRequestError, "mask: is [1, 1, 8, 4]"),
    "mask with other values": (lambda: masked(LEFT * 2), InvalidRequestError, "mask: must hold values from 0 to 1"),
    "mask of nan": (lambda: masked(LEFT / 0), SafelightError, "mask"),
    "picture by other weights": (of_other_weights, FingerprintMismatchError, "initial_latents: was made by a decoder"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_picture_is_refused_by_name_and_the_service_goes_on(start: StartDenoiser, what: str) -> None:
    make, kind, sentence = BAD[what]
    denoiser = await start()
    error = await denoiser.failure(make())
    assert isinstance(error, kind)
    assert sentence in str(error)
    assert (await denoiser.latents(image_to_image())).isfinite().all()


async def test_a_picture_whose_lease_has_ended_is_told_as_such(start: StartDenoiser) -> None:
    denoiser = await start()
    request = image_to_image()
    request.initial_latents.lease.CopyFrom(TensorLease(endpoint=denoiser.server.address, ticket="gone"))
    error = await denoiser.failure(request)
    assert isinstance(error, LeaseExpiredError)
    assert error.metadata["ticket"] == "gone"
