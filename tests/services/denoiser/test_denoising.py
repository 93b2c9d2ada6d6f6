"""The denoiser through its real server: results, sharing, cancellation, bounds and bad input."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch

from safelight.errors import (
    DeadlineExceededError,
    FingerprintMismatchError,
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
    TensorCorruptError,
    UnsupportedError,
)
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from tests.support.running_denoiser import StartDenoiser, kinds, relative_error
from tests.support.stage_requests import conditioning, denoise_request, inline


async def test_a_request_streams_its_place_every_step_and_the_latent(start: StartDenoiser) -> None:
    events = await (await start()).events(denoise_request(steps=3))
    assert kinds(events) == ["queued", "progress", "progress", "progress", "result"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    result = events[-1].result
    assert (result.steps_run, result.timing.steps, result.timing.received_bytes) == (3, 3, 0)


async def test_the_same_request_gives_the_same_bits(start: StartDenoiser) -> None:
    denoiser = await start()
    first, second = [await denoiser.latents(denoise_request(seed=5)) for _ in range(2)]
    assert torch.equal(first, second)


@pytest.mark.parametrize("batch_cfg", [True, False])
async def test_mixed_requests_share_batches_and_equal_their_solo_runs(start: StartDenoiser, batch_cfg: bool) -> None:
    denoiser = await start(batch_cfg=batch_cfg)
    mix = [("euler", 4, 5.0), ("euler_ancestral", 7, 3.0), ("ddim", 5, 1.0), ("dpmpp_2m", 9, 7.5)]
    requests = [
        denoise_request(seed=seed, sampler=sampler, steps=steps, scale=scale)
        for seed, (sampler, steps, scale) in enumerate(mix)
    ]
    alone = [await denoiser.latents(request) for request in requests]
    batches_alone = denoiser.metric("safelight_batch_size_count", stage="denoiser")
    together = await asyncio.gather(*(denoiser.latents(request) for request in requests))
    batches_together = denoiser.metric("safelight_batch_size_count", stage="denoiser") - batches_alone
    errors = [relative_error(shared, solo) for shared, solo in zip(together, alone, strict=True)]
    assert max(errors) < 1e-4
    assert batches_together < batches_alone


async def test_without_batched_cfg_the_latent_is_the_same(start: StartDenoiser) -> None:
    batched, in_turn = await start(batch_cfg=True), await start(batch_cfg=False)
    request = denoise_request(seed=3, steps=6)
    assert relative_error(await batched.latents(request), await in_turn.latents(request)) < 1e-4


async def test_no_further_step_is_computed_for_a_cancelled_request(start: StartDenoiser) -> None:
    denoiser = await start()
    call = denoiser.stub.Denoise(denoise_request(steps=1000))
    async for event in call:
        if event.progress.step == 3:
            call.cancel()
            break
    await denoiser.until_idle()
    useful = denoiser.steps("useful")
    await denoiser.latents(denoise_request(steps=2))
    # The step that was running when the call was cancelled may end; it is told as wasted, and is the only one.
    assert denoiser.steps("wasted") <= 1
    assert denoiser.steps("useful") == useful + 2 < 1000


async def test_no_further_step_is_computed_for_a_request_whose_deadline_has_passed(start: StartDenoiser) -> None:
    denoiser = await start()
    request = denoise_request(steps=1000)
    request.context.deadline.FromNanoseconds(int((time.time() + 0.2) * 1e9))
    assert type(await denoiser.failure(request)) is DeadlineExceededError
    useful = denoiser.steps("useful")
    await denoiser.latents(denoise_request(steps=2))
    assert denoiser.steps("wasted") <= 1
    assert 0 < denoiser.steps("useful") == useful + 2 < 1000


async def test_a_request_that_comes_too_late_gets_no_step(start: StartDenoiser) -> None:
    denoiser = await start()
    request = denoise_request(steps=2)
    request.context.deadline.FromNanoseconds(int((time.time() - 1) * 1e9))
    assert type(await denoiser.failure(request)) is DeadlineExceededError
    assert denoiser.steps() == 0


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(start: StartDenoiser) -> None:
    denoiser = await start(max_running=1, queue_capacity=1)
    calls = [denoiser.stub.Denoise(denoise_request(steps=1000)) for _ in range(2)]
    for call in calls:
        await call.read()
    error = await denoiser.failure(denoise_request())
    for call in calls:
        call.cancel()
    assert isinstance(error, OverloadedError)
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0


def lying_shape(request: DenoiseRequest) -> None:
    request.conditioning.tensors[0].tensor.header.shape[1] = 1000


def truncated_tensor(request: DenoiseRequest) -> None:
    ref = request.conditioning.tensors[0].tensor
    ref.inline = ref.inline[:-3]


def nan_conditioning(request: DenoiseRequest) -> None:
    embeds = torch.full((1, 8, 64), float("nan"))
    request.conditioning.tensors[0].tensor.CopyFrom(inline(embeds))


def wrong_width(request: DenoiseRequest) -> None:
    request.conditioning.tensors[0].tensor.CopyFrom(inline(torch.zeros(1, 8, 63)))


def unlike_negative(request: DenoiseRequest) -> None:
    request.negative_conditioning.CopyFrom(conditioning(1, tokens=9))


def unknown_sampler(request: DenoiseRequest) -> None:
    request.sampling.sampler = "magic"


def unknown_parameter(request: DenoiseRequest) -> None:
    request.sampling.sampler_parameters["churn"] = 1.0


def negative_steps(request: DenoiseRequest) -> None:
    request.sampling.steps = -1


def no_channels(request: DenoiseRequest) -> None:
    del request.latent_shape[:]


def negative_seed(request: DenoiseRequest) -> None:
    request.seed = -1


def negative_preview(request: DenoiseRequest) -> None:
    request.preview.every_steps = -1


def preview_without_a_map(request: DenoiseRequest) -> None:
    request.preview.every_steps = 2


def sizes_for_a_model_that_takes_none(request: DenoiseRequest) -> None:
    request.size_conditioning.crop_left = 1


def negative_checkpoints(request: DenoiseRequest) -> None:
    request.checkpoints.every_steps = -1


def unknown_class(request: DenoiseRequest) -> None:
    request.determinism = 99  # type: ignore[assignment]  # as a client of a later release might send


def priority_too_high(request: DenoiseRequest) -> None:
    request.context.priority = 101


def infinite_guidance(request: DenoiseRequest) -> None:
    request.guidance.scale = float("inf")


def planned_with_other_weights(request: DenoiseRequest) -> None:
    request.context.fingerprints["denoiser"] = "another"


def conditioning_of_another_encoder(request: DenoiseRequest) -> None:
    request.context.fingerprints["encoder"] = "ours"
    request.conditioning.tensors[0].tensor.header.fingerprint = "another"


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (lying_shape, TensorCorruptError, "conditioning.prompt_embeds"),
        (truncated_tensor, TensorCorruptError, "conditioning.prompt_embeds"),
        (nan_conditioning, NonFiniteError, "conditioning.prompt_embeds"),
        (wrong_width, InvalidRequestError, "conditioning.prompt_embeds"),
        (unlike_negative, InvalidRequestError, "negative_conditioning"),
        (unknown_sampler, InvalidRequestError, "sampling"),
        (unknown_parameter, InvalidRequestError, "sampling"),
        (negative_steps, InvalidRequestError, "sampling.steps"),
        (no_channels, InvalidRequestError, "latent_shape"),
        (negative_seed, InvalidRequestError, "seed"),
        (negative_preview, InvalidRequestError, "preview.every_steps"),
        (preview_without_a_map, UnsupportedError, "fit_latent_preview.py"),
        (sizes_for_a_model_that_takes_none, UnsupportedError, "size_conditioning"),
        (negative_checkpoints, InvalidRequestError, "checkpoints.every_steps"),
        (unknown_class, InvalidRequestError, "determinism"),
        (priority_too_high, InvalidRequestError, "context.priority"),
        (infinite_guidance, InvalidRequestError, "guidance.scale"),
        (planned_with_other_weights, FingerprintMismatchError, "context.fingerprints[denoiser]"),
        (conditioning_of_another_encoder, FingerprintMismatchError, "conditioning.prompt_embeds"),
    ],
)
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    start: StartDenoiser, spoil: Any, kind: type[Exception], field: str
) -> None:
    denoiser = await start()
    request = denoise_request()
    spoil(request)
    error = await denoiser.failure(request)
    assert isinstance(error, kind)
    assert field in str(error)
    assert (await denoiser.latents(denoise_request())).isfinite().all()
