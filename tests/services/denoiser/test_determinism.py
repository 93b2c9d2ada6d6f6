"""Laws of the determinism classes: what a request's latent may depend on, and that the answer says which was given."""

from __future__ import annotations

import asyncio

import pytest
import torch

from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, DETERMINISM_CLASS_ROUNDING
from services.denoiser.models.scheduler_config import STABLE_DIFFUSION_SAMPLERS
from tests.support.running_denoiser import StartDenoiser, latents_of, relative_error
from tests.support.stage_requests import denoise_request, exact, resumed, with_checkpoints

STEPS = 5


def mixed_requests() -> list[DenoiseRequest]:
    """Eight requests that differ in all that may differ within a batch."""
    mix = [
        ("euler", 4, 5.0),
        ("euler_ancestral", 7, 3.0),
        ("ddim", 5, 1.0),
        ("dpmpp_2m", 9, 7.5),
        ("euler", 12, 1.0),
        ("dpmpp_2m", 4, 2.0),
        ("euler_ancestral", 10, 1.0),
        ("ddim", 8, 4.0),
    ]
    return [
        denoise_request(seed=seed, sampler=sampler, steps=steps, scale=scale)
        for seed, (sampler, steps, scale) in enumerate(mix)
    ]


@pytest.mark.parametrize("batch_cfg", [True, False])
async def test_eight_mixed_requests_equal_their_solo_runs_up_to_rounding(start: StartDenoiser, batch_cfg: bool) -> None:
    denoiser = await start(batch_cfg=batch_cfg)
    alone = [await denoiser.events(request) for request in mixed_requests()]
    together = await asyncio.gather(*(denoiser.events(request) for request in mixed_requests()))
    errors = [relative_error(latents_of(ours), latents_of(solo)) for ours, solo in zip(together, alone, strict=True)]
    assert max(errors) < 1e-5
    assert {events[-1].result.determinism for events in together} == {DETERMINISM_CLASS_ROUNDING}
    assert max(event.progress.batch_size for events in together for event in events) > 1


async def test_exact_requests_equal_their_solo_runs_bit_for_bit_in_any_company(start: StartDenoiser) -> None:
    here, there = await start(batch_cfg=True), await start(batch_cfg=False)
    requests = [exact(request) for request in mixed_requests()[:4]]
    alone = [await here.latents(request) for request in requests]
    company = [asyncio.create_task(there.events(request)) for request in mixed_requests()]
    together = await asyncio.gather(*(there.events(request) for request in requests))
    await asyncio.gather(*company)
    assert all(torch.equal(latents_of(events), solo) for events, solo in zip(together, alone, strict=True))
    assert {events[-1].result.determinism for events in together} == {DETERMINISM_CLASS_EXACT}


async def test_exact_requests_share_no_forward_pass(start: StartDenoiser) -> None:
    denoiser = await start()
    together = await asyncio.gather(*(denoiser.events(exact(denoise_request(seed=seed))) for seed in range(3)))
    assert {event.progress.batch_size for events in together for event in events if event.HasField("progress")} == {1}


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION_SAMPLERS)
async def test_an_exact_request_resumed_elsewhere_at_any_step_ends_bit_for_bit_the_same(
    start: StartDenoiser, sampler: str
) -> None:
    here, there = await start(), await start(batch_cfg=False)
    request = exact(denoise_request(seed=7, steps=STEPS, sampler=sampler))
    events = await here.events(with_checkpoints(request, every_steps=1))
    points = [event.checkpoint for event in events if event.HasField("checkpoint")]
    assert [point.step for point in points] == list(range(1, STEPS))
    company = asyncio.create_task(there.events(denoise_request(seed=8, steps=30)))
    for point in points:
        assert torch.equal(await there.latents(resumed(request, point)), latents_of(events))
    await company
