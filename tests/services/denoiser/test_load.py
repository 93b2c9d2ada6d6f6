"""Laws of the denoiser's load report: what it holds and what steps have cost, as its clients see it."""

from __future__ import annotations

from safelight.v1.load_service_pb2 import GetLoadRequest, GetLoadResponse
from safelight.v1.load_service_pb2_grpc import LoadServiceStub
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser
from tests.support.stage_requests import denoise_request, exact


async def load_of(denoiser: RunningDenoiser) -> GetLoadResponse:
    return await LoadServiceStub(denoiser.channel).GetLoad(GetLoadRequest())


async def test_an_idle_denoiser_has_no_backlog(start: StartDenoiser) -> None:
    load = await load_of(await start(max_running=3, queue_capacity=5))
    assert (load.running, load.waiting, load.capacity, load.backlog_seconds, load.draining) == (0, 0, 3 + 5, 0, False)
    assert not load.costs


async def test_what_is_accepted_counts_in_seconds_until_it_is_done(start: StartDenoiser) -> None:
    denoiser = await start(max_running=1)
    calls = [denoiser.stub.Denoise(denoise_request(steps=1000)) for _ in range(2)]
    for call in calls:
        await call.read()
    busy = await load_of(denoiser)
    for call in calls:
        call.cancel()
    await denoiser.until_idle()
    assert busy.running + busy.waiting == 2
    assert busy.backlog_seconds > 0
    assert (await load_of(denoiser)).backlog_seconds == 0


async def test_steps_are_told_by_model_latent_shape_and_rows_without_those_of_the_exact_class(
    start: StartDenoiser,
) -> None:
    denoiser = await start()
    await denoiser.latents(denoise_request(scale=1.0))
    await denoiser.latents(denoise_request(scale=5.0))
    await denoiser.latents(exact(denoise_request(scale=5.0)))
    costs = (await load_of(denoiser)).costs
    assert {(cost.model, tuple(cost.latent_shape), cost.rows) for cost in costs} == {
        ("tiny", (4, 8, 8), 1),
        ("tiny", (4, 8, 8), 2),
    }
    assert all(cost.seconds > 0 for cost in costs)


async def test_after_the_warm_up_usual_requests_have_a_cost_before_the_first_one_comes(start: StartDenoiser) -> None:
    denoiser = await start(warm_up_steps=1, warm_up_seconds=60.0, max_batch_rows=2)
    costs = (await load_of(denoiser)).costs
    assert {(cost.model, tuple(cost.latent_shape), cost.rows) for cost in costs} == {
        ("tiny", (4, 16, 16), 1),
        ("tiny", (4, 16, 16), 2),
    }
