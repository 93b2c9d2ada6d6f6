"""A request's picture on its way: encoded once, elsewhere when a decoder fails, again when its latent is lost."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence

from PIL import Image

from safelight.errors import InvalidRequestError, LeaseExpiredError, OverloadedError, StageDrainingError
from safelight.v1 import work_pb2 as work
from safelight.v1.decoder_service_pb2 import (
    DecodeRequest,
    DecodeResponse,
    EncodeFilmRequest,
    EncodeFilmResponse,
    EncodeImageRequest,
    EncodeImageResponse,
)
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.generation_service_pb2 import GenerateRequest, GenerateResponse, ImageReceipt
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription
from tests.gateway.conftest import Deploy
from tests.serving import failure
from tests.support.fake_stages import (
    DECODER,
    DENOISER,
    FakeDecoder,
    FakeDenoiser,
    checkpoint,
    encoded_film,
    encoded_image,
    rest,
    step,
    whole_file,
)
from tests.support.films import film_file, moving_square


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


IMAGE = work.MediaInput(role=work.MEDIA_ROLE_IMAGE, data=picture())
MASK = work.MediaInput(role=work.MEDIA_ROLE_MASK, data=picture())
REQUEST = GenerateRequest(prompt="a cat", inputs=[IMAGE, MASK], strength=0.5, seeds=[1, 2])


def receipts_of(events: Sequence[GenerateResponse]) -> list[ImageReceipt]:
    return list(events[-1].result.images)


class Decoder(FakeDecoder):
    """Notes what it is asked, and fails its first encodes."""

    def __init__(self, *failures: Exception) -> None:
        self.encodes: list[EncodeImageRequest] = []
        self.decodes: list[DecodeRequest] = []
        self._failures = list(failures)
        super().__init__(self._note_decode, self._note_encode)

    async def _note_encode(self, request: EncodeImageRequest) -> EncodeImageResponse:
        self.encodes.append(request)
        if self._failures:
            raise self._failures.pop(0)
        return await encoded_image(request)

    async def _note_decode(self, request: DecodeRequest) -> AsyncGenerator[DecodeResponse, None]:
        self.decodes.append(request)
        async for response in whole_file(request):
            yield response


async def test_both_pictures_of_a_request_begin_with_the_one_encoded_picture(deploy: Deploy) -> None:
    decoder, denoiser = Decoder(), FakeDenoiser(rest)
    deployment = await deploy([denoiser], [decoder])
    receipts = receipts_of(await deployment.events(REQUEST))
    (encode,) = decoder.encodes
    assert (encode.image, encode.mask, encode.width, encode.height) == (IMAGE.data, MASK.data, 64, 64)
    for request in denoiser.requests:
        assert (request.initial_latents.inline, request.mask.inline, request.strength) == (b"pict", b"mask", 0.5)
    for decode in decoder.decodes:
        assert (decode.original_image, decode.mask) == (IMAGE.data, MASK.data)
    for receipt in receipts:
        assert [timing.stage for timing in receipt.timings] == ["encoder", "decoder", "denoiser", "decoder"]
        assert receipt.timings[1].compute_seconds == 1.5


async def test_without_a_mask_nothing_is_pasted(deploy: Deploy) -> None:
    decoder, denoiser = Decoder(), FakeDenoiser(rest)
    await (await deploy([denoiser], [decoder])).events(GenerateRequest(prompt="a cat", inputs=[IMAGE]))
    assert not denoiser.requests[0].HasField("mask")
    assert (decoder.decodes[0].original_image, decoder.decodes[0].mask) == (b"", b"")


async def test_a_request_without_a_picture_has_none_encoded(deploy: Deploy) -> None:
    decoder, denoiser = Decoder(), FakeDenoiser(rest)
    await (await deploy([denoiser], [decoder])).events(GenerateRequest(prompt="a cat"))
    assert decoder.encodes == []
    assert not denoiser.requests[0].HasField("initial_latents")
    assert not denoiser.requests[0].HasField("strength")


async def test_a_picture_is_encoded_elsewhere_when_a_decoder_stops(deploy: Deploy) -> None:
    decoder = Decoder(StageDrainingError("stopping", stage="decoder"))
    deployment = await deploy([FakeDenoiser(rest)], [decoder, decoder])
    for receipt in receipts_of(await deployment.events(REQUEST)):
        lost, encoded = receipt.timings[1:3]
        assert (lost.stage, encoded.stage) == ("decoder", "decoder")
        assert lost.replica != encoded.replica
    assert deployment.value("safelight_retries_total", stage="decoder") == 1


async def test_a_lost_latent_is_made_again_and_the_steps_go_on_from_the_checkpoint(deploy: Deploy) -> None:
    async def lose_it(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        if request.HasField("resume_from") and len(decoder.encodes) == 1:
            raise LeaseExpiredError("gone", ticket=request.initial_latents.lease.ticket)
        if request.HasField("resume_from"):
            async for response in rest(request):
                yield response
        else:
            for number in (1, 2, 3):
                yield step(number)
            yield checkpoint(3)
            raise StageDrainingError("stopping", stage="denoiser")

    decoder, denoiser = Decoder(), FakeDenoiser(lose_it)
    deployment = await deploy([denoiser], [decoder])
    request = GenerateRequest(prompt="a cat", inputs=[IMAGE, MASK])
    (receipt,) = receipts_of(await deployment.events(request))
    assert len(decoder.encodes) == 2
    assert denoiser.requests[-1].resume_from.step == 3
    assert receipt.steps_recomputed == 0


async def test_a_film_is_encoded_once_and_both_results_begin_with_it(deploy: Deploy) -> None:
    async def note(request: EncodeFilmRequest) -> EncodeFilmResponse:
        encodes.append(request)
        if len(encodes) == 1:
            raise StageDrainingError("stopping", stage="decoder")
        return await encoded_film(request)

    encodes: list[EncodeFilmRequest] = []
    description = DenoiserDescription(
        default_latent_frames=1, max_latent_volume=10_000, inputs=[work.MEDIA_ROLE_VIDEO], default_fps=16
    )
    description.MergeFrom(DENOISER)
    denoiser, decoder = FakeDenoiser(rest, description), FakeDecoder(encode_film=note)
    decoder.description = DecoderDescription(frames_per_latent=4)
    decoder.description.MergeFrom(DECODER)
    film = work.MediaInput(role=work.MEDIA_ROLE_VIDEO, data=film_file(moving_square(6, (64, 64))))
    deployment = await deploy([denoiser], [decoder, decoder])
    events = await deployment.events(GenerateRequest(prompt="a cat", inputs=[film], strength=0.5, seeds=[1, 2]))
    _, encode = encodes
    assert (encode.film, encode.width, encode.height, encode.num_frames) == (film.data, 64, 64, 5)
    for request in denoiser.requests:
        assert (request.initial_latents.inline, request.strength) == (b"film", 0.5)
        assert list(request.latent_shape) == [4, 2, 8, 8]
    for receipt in receipts_of(events):
        lost, encoded = [timing for timing in receipt.timings[:-1] if timing.stage == "decoder"]
        assert lost.replica != encoded.replica
        assert encoded.compute_seconds == 2.5


async def test_input_pictures_are_bounded_in_all(deploy: Deploy) -> None:
    async def wait(request: EncodeImageRequest) -> EncodeImageResponse:
        reached.set()
        await released.wait()
        return await encoded_image(request)

    reached, released = asyncio.Event(), asyncio.Event()
    deployment = await deploy(
        [FakeDenoiser(rest)], [FakeDecoder(encode_image=wait)], max_input_bytes=3 * len(IMAGE.data)
    )
    first = asyncio.create_task(deployment.events(REQUEST))
    await reached.wait()
    error = await failure(deployment.events(REQUEST))
    released.set()
    await first
    assert isinstance(error, OverloadedError)
    assert error.retry_after_seconds is not None
    assert "bytes of input files" in error.message
    assert await deployment.events(REQUEST)


async def test_what_is_no_picture_reaches_no_stage(deploy: Deploy) -> None:
    decoder = Decoder()
    deployment = await deploy([FakeDenoiser(rest)], [decoder])
    broken = GenerateRequest(inputs=[work.MediaInput(role=work.MEDIA_ROLE_IMAGE, data=b"no picture")])
    error = await failure(deployment.events(broken))
    assert isinstance(error, InvalidRequestError)
    assert error.violations[0].field == "inputs[0].data"
    assert decoder.encodes == []
