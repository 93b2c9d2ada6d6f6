"""Laws of checkpoints: how often they come, what they cost, and what may be resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safelight.errors import FingerprintMismatchError, InvalidRequestError, SafelightError, TensorCorruptError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.tensor_exchange_service_pb2 import PullRequest
from safelight.v1.tensor_exchange_service_pb2_grpc import TensorExchangeServiceStub
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorRef
from services.common.exchange import Payload, TensorStore
from services.common.metrics import Metrics
from services.denoiser.checkpoints import (
    SHARE_OF_STEP_TIME,
    CheckpointCosts,
    CheckpointPace,
    CheckpointWriter,
    affordable_interval,
)
from services.denoiser.sampling.state import SamplerState, state_from_bytes, state_size
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser, checkpoints_of, kinds, relative_error
from tests.support.stage_requests import denoise_request, resumed, with_checkpoints

STEPS = 6
seconds = st.floats(1e-6, 1e3)


@given(cost=seconds, step=seconds)
def test_checkpoints_cost_at_most_a_hundredth_of_the_steps_between_them_and_come_as_often_as_that_allows(
    cost: float, step: float
) -> None:
    interval = affordable_interval(cost, step)
    assert cost <= SHARE_OF_STEP_TIME * step * interval * (1 + 1e-9)
    assert interval == 1 or cost > SHARE_OF_STEP_TIME * step * (interval - 1) * (1 - 1e-9)


def test_the_measured_cost_takes_the_place_of_the_estimate_and_follows_the_measurements() -> None:
    costs = CheckpointCosts()
    assert 0 < costs.seconds(1000) < costs.seconds(1_000_000)
    costs.record(1000, 0.25)
    assert costs.seconds(1000) == 0.25
    for _ in range(50):
        costs.record(1000, 0.5)
    assert costs.seconds(1000) == pytest.approx(0.5, rel=1e-3)


def state_at(step: int) -> SamplerState:
    return SamplerState(torch.zeros(1, 4, 8, 8), step, (), 1)


def test_the_interval_of_a_request_that_leaves_it_to_the_denoiser_follows_cost_and_step_time() -> None:
    costs = CheckpointCosts()
    costs.record(4 * 8 * 8 * 4, 0.001)  # a hundredth of 0.1 s
    pace = CheckpointPace(0, costs, step=2)
    due = [step for step in range(3, 12) if pace.due(state_at(step), step_seconds=0.02)]
    assert due == [7]


class BusyStore(TensorStore):
    """One whose threads get their turn late."""

    async def put(self, header: TensorHeader, payload: Payload) -> TensorRef:
        await asyncio.sleep(0.05)
        return await super().put(header, payload)


async def test_waiting_for_a_turn_is_no_cost_of_a_checkpoint() -> None:
    metrics = Metrics()
    writer = CheckpointWriter(BusyStore(60.0, metrics), metrics)
    await writer.write(state_at(1), "fingerprint")
    assert 0 < writer.costs.seconds(state_size(state_at(1))) < 0.05


async def test_checkpoints_come_every_so_many_steps_but_not_after_the_last(start: StartDenoiser) -> None:
    events = await (await start()).events(with_checkpoints(denoise_request(steps=STEPS), every_steps=2))
    assert kinds(events) == [
        *("queued", "progress", "progress", "checkpoint", "progress", "progress", "checkpoint"),
        *("progress", "progress", "result"),
    ]
    assert [checkpoint.step for checkpoint in checkpoints_of(events)] == [2, 4]


async def test_without_being_asked_for_there_are_no_checkpoints(start: StartDenoiser) -> None:
    assert "checkpoint" not in kinds(await (await start()).events(denoise_request(steps=STEPS)))


async def test_checkpoints_that_the_denoiser_times_itself_are_counted_with_their_cost(start: StartDenoiser) -> None:
    denoiser = await start()
    events = await denoiser.events(with_checkpoints(denoise_request(steps=60), every_steps=0))
    made = len(checkpoints_of(events))
    assert made > 0
    assert denoiser.metric("safelight_checkpoint_seconds_count") == made


async def test_a_resumed_request_computes_the_rest_only_and_counts_on(start: StartDenoiser) -> None:
    denoiser = await start()
    whole = await denoiser.events(with_checkpoints(denoise_request(steps=STEPS), every_steps=4))
    before = denoiser.steps()
    rest = await denoiser.events(resumed(denoise_request(steps=STEPS), checkpoints_of(whole)[0]))
    assert [event.progress.step for event in rest if event.HasField("progress")] == [5, 6]
    assert denoiser.steps() - before == 2
    assert (rest[-1].result.steps_run, rest[-1].result.timing.steps) == (2, 2)


async def test_the_checkpoints_of_a_resumed_request_go_on_from_its_own(start: StartDenoiser) -> None:
    denoiser = await start()
    whole = await denoiser.events(with_checkpoints(denoise_request(steps=STEPS), every_steps=1))
    resumed_at_1 = with_checkpoints(resumed(denoise_request(steps=STEPS), checkpoints_of(whole)[0]), every_steps=2)
    assert [point.step for point in checkpoints_of(await denoiser.events(resumed_at_1))] == [3, 5]


async def test_a_large_checkpoint_is_leased_until_it_is_one_of_many_or_the_request_ends(start: StartDenoiser) -> None:
    denoiser = await start()
    request = with_checkpoints(denoise_request(steps=STEPS, scale=1.0, sampler="dpmpp_2m"), every_steps=2)
    request.latent_shape[:] = [4, 48, 48]  # with its history too large to travel inline
    call = denoiser.stub.Denoise(request)
    held, pulled = [], []
    async for event in call:
        if event.HasField("checkpoint"):
            pulled.append(await pull(denoiser, event.checkpoint.sampler_state))
            held.append(denoiser.metric("safelight_leases"))
    assert [state_from_bytes(data).step_index for data in pulled] == [2, 4]
    assert max(held) <= 2
    assert denoiser.metric("safelight_leases") == 0


async def pull(denoiser: RunningDenoiser, ref: TensorRef) -> bytes:
    call = TensorExchangeServiceStub(denoiser.channel).Pull(PullRequest(ticket=ref.lease.ticket))
    return b"".join([chunk.data async for chunk in call])


def of_other_weights(request: DenoiseRequest) -> None:
    request.resume_from.sampler_state.header.fingerprint = "another"


def of_no_weights(request: DenoiseRequest) -> None:
    request.resume_from.sampler_state.header.fingerprint = ""


def truncated(request: DenoiseRequest) -> None:
    request.resume_from.sampler_state.inline = request.resume_from.sampler_state.inline[:-10]


def flipped_bit(request: DenoiseRequest) -> None:
    data = bytearray(request.resume_from.sampler_state.inline)
    data[-1] ^= 1
    request.resume_from.sampler_state.inline = bytes(data)


def not_bytes(request: DenoiseRequest) -> None:
    request.resume_from.sampler_state.CopyFrom(request.conditioning.tensors[0].tensor)


def empty(request: DenoiseRequest) -> None:
    request.resume_from.ClearField("sampler_state")


def another_step(request: DenoiseRequest) -> None:
    request.resume_from.step += 1


def step_beyond_the_last(request: DenoiseRequest) -> None:
    request.sampling.steps = 3


def another_sampler(request: DenoiseRequest) -> None:
    request.sampling.sampler = "euler"


def another_size(request: DenoiseRequest) -> None:
    request.latent_shape[:] = [4, 8, 9]


def rewrite(request: DenoiseRequest, **changes: Tensor) -> None:
    """Change tensors of the checkpoint, its header telling the truth of the new bytes."""
    ref = request.resume_from.sampler_state
    data = safetensors.torch.save(safetensors.torch.load(ref.inline) | changes)
    header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[len(data)], fingerprint=ref.header.fingerprint)
    ref.CopyFrom(TensorRef(header=header, inline=data))


def nan_latents(request: DenoiseRequest) -> None:
    rewrite(request, latents=torch.full((1, 4, 8, 8), float("nan")))


def half_latents(request: DenoiseRequest) -> None:
    rewrite(request, latents=torch.zeros(1, 4, 8, 8, dtype=torch.float16))


def nan_history(request: DenoiseRequest) -> None:
    rewrite(request, **{"history.0": torch.full((1, 4, 8, 8), float("inf"))})


def too_much_history(request: DenoiseRequest) -> None:
    rewrite(request, **{"history.1": torch.zeros(1, 4, 8, 8)})


def wild_noise_draws(request: DenoiseRequest) -> None:
    rewrite(request, position=torch.tensor([4, 1_000_000_000, 0]))


def calls_of_another_sampler(request: DenoiseRequest) -> None:
    rewrite(request, position=torch.tensor([4, 1, 1]))


def fractional_position(request: DenoiseRequest) -> None:
    rewrite(request, position=torch.tensor([4.0, 1.0, 0.0]))


def scalar_position(request: DenoiseRequest) -> None:
    rewrite(request, position=torch.tensor(4))


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (of_other_weights, FingerprintMismatchError, "resume_from.sampler_state"),
        (of_no_weights, FingerprintMismatchError, "resume_from.sampler_state"),
        (truncated, TensorCorruptError, "resume_from.sampler_state"),
        (flipped_bit, TensorCorruptError, "resume_from.sampler_state"),
        (not_bytes, InvalidRequestError, "resume_from.sampler_state"),
        (empty, InvalidRequestError, "resume_from.sampler_state"),
        (another_step, InvalidRequestError, "resume_from.step"),
        (step_beyond_the_last, InvalidRequestError, "resume_from.step"),
        (another_sampler, InvalidRequestError, "resume_from.sampler_state"),
        (another_size, InvalidRequestError, "resume_from.sampler_state"),
        (nan_latents, InvalidRequestError, "not finite"),
        (half_latents, InvalidRequestError, "float16"),
        (nan_history, InvalidRequestError, "not finite"),
        (too_much_history, InvalidRequestError, "keeps 2 tensors"),
        (wild_noise_draws, InvalidRequestError, "drawn noise"),
        (calls_of_another_sampler, InvalidRequestError, "calls of a step"),
        (fractional_position, InvalidRequestError, "not a serialised sampler state"),
        (scalar_position, InvalidRequestError, "not a serialised sampler state"),
    ],
)
async def test_a_checkpoint_that_is_not_this_requests_is_refused_by_name_and_the_service_goes_on(
    start: StartDenoiser, spoil: Callable[[DenoiseRequest], None], kind: type[SafelightError], field: str
) -> None:
    denoiser = await start()
    request = denoise_request(steps=STEPS, sampler="dpmpp_2m")
    whole = await denoiser.events(with_checkpoints(request, every_steps=4))
    good = resumed(request, checkpoints_of(whole)[0])
    bad = DenoiseRequest()
    bad.CopyFrom(good)
    spoil(bad)
    error = await denoiser.failure(bad)
    assert isinstance(error, kind)
    assert field in str(error)
    assert relative_error(await denoiser.latents(good), await denoiser.latents(request)) < 1e-5
