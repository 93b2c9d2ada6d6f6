"""A picture goes on from its newest checkpoint when its denoiser is lost, and the client sees each step once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import grpc
import pytest

from safelight.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    ModelRestartingError,
    OverloadedError,
    SafelightError,
    StageDrainingError,
    StageUnavailableError,
    from_rpc_error,
)
from safelight.v1 import work_pb2 as work
from safelight.v1.decoder_service_pb2 import DecodeProgress, DecodeRequest, DecodeResponse
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse, Heartbeat, LatentPreview
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.generation_service_pb2 import GenerateRequest, GenerateResponse, ImageReceipt
from safelight.v1.model_pb2 import DenoiserDescription
from services.common.settings import ServerSettings
from tests.gateway.conftest import Deploy, FakeDeployment
from tests.serving import Serve
from tests.support.fake_stages import (
    DENOISER,
    FILE,
    Denoise,
    FakeDecoder,
    FakeDenoiser,
    FakeEncoder,
    checkpoint,
    encoded,
    latent,
    rest,
    step,
    whole_file,
)

REQUEST = GenerateRequest(prompt="a cat", seeds=[1], determinism=work.DETERMINISM_CLASS_EXACT)


def receipt_of(events: Sequence[GenerateResponse]) -> ImageReceipt:
    (receipt,) = events[-1].result.images
    return receipt


def steps_of(events: Sequence[GenerateResponse]) -> list[int]:
    return [event.progress.step for event in events if event.progress.stage == "denoiser"]


def file_of(events: Sequence[GenerateResponse]) -> bytes:
    """The file as a client puts it together."""
    file = bytearray()
    for event in events:
        if event.HasField("chunk"):
            del file[event.chunk.offset :]
            file += event.chunk.data
    return bytes(file)


class Lost:
    """A denoise that goes to step 5 with a checkpoint after step 3, and then does what it was made to do.

    Args:
        end: what it raises; None: it falls silent.
    """

    def __init__(self, end: Exception | None = None) -> None:
        self.end = end
        self.done = asyncio.Event()

    async def __call__(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        for number in (1, 2, 3):
            yield step(number)
        yield checkpoint(3)
        for number in (4, 5):
            yield step(number)
        self.done.set()
        if self.end is not None:
            raise self.end
        await asyncio.Event().wait()


class First:
    """Whichever of several replicas is called first does one thing, all others another."""

    def __init__(self, once: Lost) -> None:
        self.once = once
        self.called = False
        self.fakes: list[FakeDenoiser] = []

    async def __call__(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        answer = rest(request) if self.called else self.once(request)
        self.called = True
        async for response in answer:
            yield response

    def replicas(self, count: int = 2) -> list[FakeDenoiser]:
        self.fakes = [FakeDenoiser(self) for _ in range(count)]
        return self.fakes

    @property
    def resumed(self) -> list[DenoiseRequest]:
        """What replicas were asked after the first one was lost."""
        requests = [request for fake in self.fakes for request in fake.requests]
        return [request for request in requests if request.HasField("resume_from")]


def with_fingerprint(fingerprint: str) -> DenoiserDescription:
    """The denoiser's part of the model with other weights."""
    description = DenoiserDescription()
    description.CopyFrom(DENOISER)
    description.fingerprint = fingerprint
    return description


async def busy(deployment: FakeDeployment, fakes: Sequence[FakeDenoiser]) -> int:
    """Index of the replica that has the request."""
    while not any(fake.requests for fake in fakes):  # noqa: ASYNC110  only the fake tells
        await asyncio.sleep(0.005)
    return next(index for index, fake in enumerate(fakes) if fake.requests)


def check_resumed_after_five_steps(deployment: FakeDeployment, events: list[GenerateResponse], reason: str) -> None:
    receipt = receipt_of(events)
    assert steps_of(events) == list(range(1, 11))
    assert (receipt.steps_run, receipt.steps_recomputed) == (12, 2)
    assert [(timing.stage, timing.steps) for timing in receipt.timings][1] == ("denoiser", 5)
    assert [timing.stage for timing in receipt.timings] == ["encoder", "denoiser", "denoiser", "decoder"]
    assert len({timing.replica for timing in receipt.timings}) == 4
    assert file_of(events) == FILE
    assert deployment.value("safelight_resumes_total", reason=reason) == 1
    assert deployment.value("safelight_denoise_recomputed_steps_total") == 2


async def test_after_a_death_the_picture_goes_on_from_the_newest_checkpoint(deploy: Deploy) -> None:
    first = First(Lost())
    fakes = first.replicas()
    deployment = await deploy(fakes, silence_seconds=60.0)  # only its death shall be noticed
    run = asyncio.create_task(deployment.events(REQUEST))
    await first.once.done.wait()
    await deployment.until("safelight_checkpoint_bytes", len(b"state after 3"))
    await deployment.denoisers[await busy(deployment, fakes)].stop()
    check_resumed_after_five_steps(deployment, await run, "death")
    assert [fake.states for fake in fakes if fake.states] == [[b"state after 3"]]
    await deployment.until("safelight_checkpoint_bytes", 0)


async def test_after_silence_the_picture_goes_on_elsewhere_and_the_silent_call_is_cancelled(deploy: Deploy) -> None:
    first = First(Lost())
    fakes = first.replicas()
    deployment = await deploy(fakes, silence_seconds=0.3)
    check_resumed_after_five_steps(deployment, await deployment.events(REQUEST), "silence")
    while sum(fake.cancelled for fake in fakes) != 1:  # noqa: ASYNC110  only the fake tells
        await asyncio.sleep(0.005)


async def test_a_drain_hands_the_picture_on_and_is_no_failed_attempt(deploy: Deploy) -> None:
    first = First(Lost(StageDrainingError("stopping", stage="denoiser")))
    deployment = await deploy(first.replicas(), max_attempts=1)
    check_resumed_after_five_steps(deployment, await deployment.events(REQUEST), "drain")


async def test_a_picture_waits_for_the_only_replica_that_starts_its_model_again(deploy: Deploy) -> None:
    first = First(Lost(ModelRestartingError("a rank was lost", stage="denoiser", model="fake")))
    (fake,) = first.replicas(1)
    deployment = await deploy([fake], replica_wait_seconds=0.01)
    run = asyncio.create_task(deployment.events(REQUEST))
    await first.once.done.wait()
    fake.restarting = True
    await deployment.until("safelight_resumes_total", 1, reason="restart")
    later = asyncio.create_task(deployment.events(REQUEST))
    assert len(fake.requests) == 1
    fake.restarting = False
    events = await run
    assert steps_of(events) == list(range(1, 11))
    assert file_of(events) == file_of(await later) == FILE
    assert len(first.resumed) == 1


async def test_a_picture_goes_on_at_once_where_another_replica_has_its_model(deploy: Deploy) -> None:
    first = First(Lost(ModelRestartingError("a rank was lost", stage="denoiser", model="fake")))
    deployment = await deploy(first.replicas())
    check_resumed_after_five_steps(deployment, await deployment.events(REQUEST), "restart")


async def test_the_last_checkpoint_of_a_drain_is_fetched_before_the_picture_goes_on(deploy: Deploy) -> None:
    state = bytes(range(256)) * 1024  # more than rides inline
    draining: list[FakeDenoiser] = []
    fakes = [FakeDenoiser(rest), FakeDenoiser(rest)]

    def answer(fake: FakeDenoiser) -> Denoise:
        async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
            if not draining:
                draining.append(fake)
                yield step(7)
                yield checkpoint(7, await fake.lease(state))
                raise StageDrainingError("stopping", stage="denoiser")
            async for response in rest(request):
                yield response

        return denoise

    for fake in fakes:
        fake.denoise = answer(fake)
    deployment = await deploy(fakes)
    receipt = receipt_of(await deployment.events(REQUEST))
    assert [each for fake in fakes for each in fake.states] == [state]
    assert (receipt.steps_run, receipt.steps_recomputed) == (4, 0)
    await draining[0].store.until_empty()


async def test_heartbeats_keep_a_long_step_alive(deploy: Deploy) -> None:
    async def slow(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield DenoiseResponse(heartbeat=Heartbeat())
        async for response in rest(request):
            yield response

    deployment = await deploy([FakeDenoiser(slow)], silence_seconds=0.3)
    assert receipt_of(await deployment.events(REQUEST)).steps_run == 10


@pytest.mark.parametrize(
    "refusal",
    [
        InvalidRequestError.of("resume_from.sampler_state", "is of another request"),
        FingerprintMismatchError("other weights", field="resume_from.sampler_state", stage="denoiser"),
    ],
)
async def test_a_refused_checkpoint_means_noise_and_costs_no_attempt(deploy: Deploy, refusal: SafelightError) -> None:
    drained = Lost(StageDrainingError("stopping", stage="denoiser"))

    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        if not drained.done.is_set():
            answer = drained(request)
        elif request.HasField("resume_from"):
            raise refusal
        else:
            answer = rest(request)
        async for response in answer:
            yield response

    deployment = await deploy([FakeDenoiser(denoise), FakeDenoiser(denoise)], max_attempts=1)
    events = await deployment.events(REQUEST)
    assert steps_of(events) == list(range(1, 11))
    assert (receipt_of(events).steps_run, receipt_of(events).steps_recomputed) == (15, 5)


async def test_a_picture_that_comes_further_each_time_is_never_given_up(deploy: Deploy) -> None:
    async def one_step(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        number = request.resume_from.step + 1
        yield step(number)
        if number < 10:
            yield checkpoint(number)
            raise OverloadedError("no room any more", retry_after_seconds=0.0)
        yield latent()

    deployment = await deploy([FakeDenoiser(one_step)], max_attempts=2)
    receipt = receipt_of(await deployment.events(REQUEST))
    assert (receipt.steps_run, receipt.steps_recomputed) == (10, 0)


async def test_a_picture_that_kills_every_replica_at_the_same_step_is_given_up(deploy: Deploy) -> None:
    async def poison(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        for number in range(request.resume_from.step + 1, 5):
            yield step(number)
            yield checkpoint(3)
        raise StageUnavailableError("as gRPC says it of a process that has died")

    fakes = [FakeDenoiser(poison), FakeDenoiser(poison)]
    deployment = await deploy(fakes, max_attempts=3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deployment.events(REQUEST)
    assert isinstance(from_rpc_error(caught.value), StageUnavailableError)
    assert sum(len(fake.requests) for fake in fakes) == 3


async def test_work_in_progress_waits_for_a_replica_to_come(deploy: Deploy, serve: Serve) -> None:
    first = First(Lost())
    deployment = await deploy(first.replicas(1), silence_seconds=60.0)  # only its death shall be noticed
    run = asyncio.create_task(deployment.events(REQUEST))
    await first.once.done.wait()
    await deployment.until("safelight_checkpoint_bytes", len(b"state after 3"))
    (gone,) = deployment.denoisers
    await gone.stop()
    await deployment.until("safelight_replicas", 0, stage="denoiser", healthy="true")
    again = FakeDenoiser(first)
    await serve(again.service(), ServerSettings(listen=gone.address, drain_seconds=0.0))
    assert steps_of(await run) == list(range(1, 11))
    assert again.states == [b"state after 3"]


async def test_work_in_progress_waits_no_longer_than_it_may(deploy: Deploy) -> None:
    first = First(Lost())
    deployment = await deploy(first.replicas(1), replica_wait_seconds=0.2)
    run = asyncio.create_task(deployment.events(REQUEST))
    await first.once.done.wait()
    await deployment.denoisers[0].stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run
    error = from_rpc_error(caught.value)
    assert isinstance(error, StageUnavailableError)
    assert error.retry_after_seconds


async def test_a_lost_latent_is_made_again_from_the_newest_checkpoint(deploy: Deploy) -> None:
    denoised = 0

    async def with_checkpoint(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        nonlocal denoised
        denoised += 1
        for number in range(request.resume_from.step + 1, 11):
            yield step(number)
            if number == 8:
                yield checkpoint(8)
        yield latent()

    async def latent_is_gone_once(request: DecodeRequest) -> AsyncGenerator[DecodeResponse, None]:
        if denoised == 1:
            raise LeaseExpiredError("gone", ticket="of the latent")
        async for response in whole_file(request):
            yield response

    fake = FakeDenoiser(with_checkpoint)
    deployment = await deploy([fake], [FakeDecoder(latent_is_gone_once)])
    receipt = receipt_of(await deployment.events(REQUEST))
    assert (receipt.steps_run, receipt.steps_recomputed) == (12, 2)
    assert fake.states == [b"state after 8"]


async def test_a_decoder_lost_in_the_middle_of_the_file_means_the_file_again_from_its_first_byte(
    deploy: Deploy,
) -> None:
    calls = 0

    async def silent_once(request: DecodeRequest) -> AsyncGenerator[DecodeResponse, None]:
        nonlocal calls
        calls += 1
        first = calls == 1
        async for response in whole_file(request):
            yield response
            if first:
                await asyncio.Event().wait()

    deployment = await deploy([FakeDenoiser(rest)], [FakeDecoder(silent_once)] * 2, decode_seconds=0.3)
    events = await deployment.events(REQUEST)
    offsets = [event.chunk.offset for event in events if event.HasField("chunk")]
    assert offsets == [0, 0, len(FILE) // 2]
    assert file_of(events) == FILE
    assert [timing.stage for timing in receipt_of(events).timings] == ["encoder", "denoiser", "decoder", "decoder"]


async def test_the_client_is_told_each_latent_frame_once_though_its_decoder_was_lost(deploy: Deploy) -> None:
    calls: list[int] = []

    async def lost_once(request: DecodeRequest) -> AsyncGenerator[DecodeResponse, None]:
        calls.append(len(calls))
        for number in range(1, 4):
            if len(calls) == 1 and number == 3:
                raise StageDrainingError("is stopping", stage="decoder")
            yield DecodeResponse(progress=DecodeProgress(step=number, steps=3))
        async for event in whole_file(request):
            yield event

    deployment = await deploy([FakeDenoiser(rest)], [FakeDecoder(lost_once)] * 2)
    events = await deployment.events(REQUEST)
    told = [event.progress.step for event in events if event.progress.stage == "decoder"]
    assert (told, len(calls), file_of(events)) == ([0, 1, 2, 3], 2, FILE)


async def test_a_silent_encoder_is_left_for_another(deploy: Deploy) -> None:
    calls = 0

    async def silent_once(request: EncodeRequest) -> EncodeResponse:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return await encoded(request)

    deployment = await deploy([FakeDenoiser(rest)], encoders=[FakeEncoder(silent_once)] * 2, encode_seconds=0.3)
    timings = receipt_of(await deployment.events(REQUEST)).timings
    assert [(timing.stage, timing.compute_seconds) for timing in timings[:2]] == [("encoder", 0.0), ("encoder", 0.25)]
    assert timings[0].replica != timings[1].replica


async def test_the_receipt_tells_what_made_the_picture_and_what_it_cost(deploy: Deploy) -> None:
    fake = FakeDenoiser(rest)
    deployment = await deploy([fake])
    request = GenerateRequest(
        prompt="a cat",
        seeds=[3],
        determinism=work.DETERMINISM_CLASS_EXACT,
        output=work.OutputOptions(format=work.OUTPUT_FORMAT_PNG, omit_metadata=True),
    )
    receipt = receipt_of(await deployment.events(request))
    assert dict(receipt.parameters.fingerprints) == {"encoder": "e", "denoiser": "d", "decoder": "v"}
    assert (receipt.steps_run, receipt.steps_recomputed, receipt.steps_saved) == (10, 0, 0)
    assert (receipt.determinism, receipt.output) == (work.DETERMINISM_CLASS_EXACT, request.output)
    assert (receipt.file_size, receipt.file_sha256) == (len(FILE), b"h")
    assert [timing.replica for timing in receipt.timings] == [
        stage[0].address for stage in (deployment.encoders, deployment.denoisers, deployment.decoders)
    ]
    (asked,) = fake.requests
    assert asked.determinism == work.DETERMINISM_CLASS_EXACT
    assert asked.HasField("checkpoints")
    assert dict(asked.context.fingerprints) == {"encoder": "e", "denoiser": "d", "decoder": "v"}


async def test_previews_are_passed_on_and_never_twice(deploy: Deploy) -> None:
    drained = Lost(StageDrainingError("stopping", stage="denoiser"))

    async def denoise(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        async for response in drained(request) if not drained.done.is_set() else rest(request):
            yield response
            if response.progress.step % request.preview.every_steps == 0 and response.HasField("progress"):
                small = LatentPreview(step=response.progress.step, data=b"small", media_type="image/jpeg")
                yield DenoiseResponse(preview=small)

    deployment = await deploy([FakeDenoiser(denoise), FakeDenoiser(denoise)])
    request = GenerateRequest(prompt="a cat", preview=work.PreviewOptions(every_steps=4))
    events = await deployment.events(request)
    assert [event.preview.step for event in events if event.HasField("preview")] == [4, 8]


async def test_when_the_weights_are_replaced_a_picture_without_a_file_is_made_with_the_new_ones(
    deploy: Deploy, serve: Serve
) -> None:
    first = First(Lost())
    deployment = await deploy(first.replicas(1), silence_seconds=60.0)  # only its death shall be noticed
    run = asyncio.create_task(deployment.events(REQUEST))
    await first.once.done.wait()
    await deployment.until("safelight_checkpoint_bytes", len(b"state after 3"))
    (gone,) = deployment.denoisers
    await gone.stop()
    upgraded = FakeDenoiser(first, with_fingerprint("d2"))
    await serve(upgraded.service(), ServerSettings(listen=gone.address, drain_seconds=0.0))
    events = await run
    receipt = receipt_of(events)
    assert receipt.parameters.fingerprints["denoiser"] == "d2"
    assert receipt.parameters.seed == 1
    assert (receipt.steps_run, receipt.steps_recomputed) == (15, 5)
    assert upgraded.states == []
    assert steps_of(events) == list(range(1, 11))


async def test_a_replica_that_turns_out_to_have_other_weights_is_planned_with_anew(deploy: Deploy) -> None:
    async def picky(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        if request.context.fingerprints["denoiser"] != "d2":
            fake.description = with_fingerprint("d2")  # the gateway has not probed it since
            raise FingerprintMismatchError("other weights", field="context.fingerprints[denoiser]", stage="denoiser")
        async for response in rest(request):
            yield response

    fake = FakeDenoiser(picky)
    deployment = await deploy([fake])
    receipt = receipt_of(await deployment.events(REQUEST))
    assert receipt.parameters.fingerprints["denoiser"] == "d2"
    assert (receipt.steps_run, receipt.steps_recomputed) == (10, 0)


async def test_weights_that_the_client_asks_for_and_nobody_has_are_refused(deploy: Deploy) -> None:
    deployment = await deploy([FakeDenoiser(rest)])
    request = GenerateRequest(prompt="a cat", context=work.WorkContext(fingerprints={"decoder": "of last year"}))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deployment.events(request)
    error = from_rpc_error(caught.value)
    assert isinstance(error, FingerprintMismatchError)
    assert error.metadata["stage"] == "decoder"
