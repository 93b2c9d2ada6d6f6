"""A request's keyframes on their way: to the encoder and the decoder at once, and from both to the denoiser."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

from PIL import Image

from gateway.inputs import IMAGE_EMBEDS
from safelight.errors import InvalidRequestError, StageDrainingError
from safelight.v1 import work_pb2 as work
from safelight.v1.decoder_service_pb2 import EncodeFilmRequest, EncodeFilmResponse
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription
from tests.gateway.conftest import Deploy
from tests.serving import failure
from tests.support.fake_stages import (
    DECODER,
    DENOISER,
    ENCODER,
    FakeDecoder,
    FakeDenoiser,
    FakeEncoder,
    checkpoint,
    encoded,
    encoded_film,
    rest,
    step,
)


def picture(colour: str) -> work.MediaInput:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return work.MediaInput(role=work.MEDIA_ROLE_IMAGE, data=file.getvalue())


PICTURES = [picture("red"), picture("blue")]
REQUEST = GenerateRequest(prompt="a cat", inputs=PICTURES, num_frames=9, width=64, height=64)


def led(*conditioning: str) -> DenoiserDescription:
    """A denoiser that is led through one or two keyframes."""
    description = DenoiserDescription()
    description.CopyFrom(DENOISER)
    del description.inputs[:]
    description.inputs.append(work.MEDIA_ROLE_IMAGE)
    description.conditioning.extend(["prompt_embeds", *conditioning])
    description.min_keyframes, description.max_keyframes = 1, 2
    description.default_latent_frames, description.max_latent_volume = 3, 64 * 3
    return description


SEEING = EncoderDescription()
SEEING.CopyFrom(ENCODER)
SEEING.inputs.append(work.MEDIA_ROLE_IMAGE)
FILMS = DecoderDescription()
FILMS.CopyFrom(DECODER)
FILMS.frames_per_latent = 4


class Encoders:
    """An encoder and a decoder, each of which waits until the other has been asked."""

    def __init__(self, *failures: Exception) -> None:
        self.encodes: list[EncodeRequest] = []
        self.films: list[EncodeFilmRequest] = []
        self.cancelled = 0
        self._asked = {"encoder": asyncio.Event(), "decoder": asyncio.Event()}
        self._failures = list(failures)
        self.encoder = FakeEncoder(self._encode, SEEING)
        self.decoder = FakeDecoder(encode_film=self._encode_film, description=FILMS)

    async def _encode(self, request: EncodeRequest) -> EncodeResponse:
        self.encodes.append(request)
        self._asked["encoder"].set()
        try:
            await self._asked["decoder"].wait()
            return await encoded(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _encode_film(self, request: EncodeFilmRequest) -> EncodeFilmResponse:
        self.films.append(request)
        await self._asked["encoder"].wait()
        if self._failures:
            raise self._failures.pop(0)
        self._asked["decoder"].set()
        response = await encoded_film(request)
        response.keyframe_indices.extend([0, 8])
        return response


async def test_the_encoder_and_the_decoder_work_on_them_at_once_and_the_denoiser_is_told(deploy: Deploy) -> None:
    stages, denoiser = Encoders(), FakeDenoiser(rest, led(IMAGE_EMBEDS))
    events = await (await deploy([denoiser], [stages.decoder], [stages.encoder])).events(REQUEST)
    (encode,), (film,), (denoise,) = stages.encodes, stages.films, denoiser.requests
    files = [given.data for given in PICTURES]
    assert [given.data for given in encode.inputs] == files
    assert (encode.width, encode.height) == (64, 64)
    assert list(film.keyframes) == files
    assert (film.width, film.height, film.num_frames, film.film) == (64, 64, 9, b"")
    assert (denoise.keyframe_latents.inline, list(denoise.keyframe_indices)) == (b"film", [0, 8])
    assert not denoise.HasField("initial_latents")
    assert not denoise.HasField("strength")
    (receipt,) = events[-1].result.images
    assert [timing.stage for timing in receipt.timings] == ["encoder", "decoder", "denoiser", "decoder"]


async def test_a_model_that_is_told_of_them_by_their_latents_alone_leaves_the_encoder_out(deploy: Deploy) -> None:
    stages, denoiser = Encoders(), FakeDenoiser(rest, led())
    await (await deploy([denoiser], [stages.decoder], [stages.encoder])).events(REQUEST)
    assert not stages.encodes[0].inputs
    assert len(stages.films[0].keyframes) == 2


async def test_they_are_encoded_elsewhere_when_a_decoder_stops(deploy: Deploy) -> None:
    stages = Encoders(StageDrainingError("stopping", stage="decoder"))
    deployment = await deploy(
        [FakeDenoiser(rest, led(IMAGE_EMBEDS))], [stages.decoder, stages.decoder], [stages.encoder]
    )
    (receipt,) = (await deployment.events(REQUEST))[-1].result.images
    lost, kept = receipt.timings[1:3]
    assert (lost.stage, kept.stage) == ("decoder", "decoder")
    assert lost.replica != kept.replica
    assert len(stages.encodes) == 1


async def test_a_request_that_goes_on_elsewhere_brings_them_again_without_encoding_them_again(deploy: Deploy) -> None:
    async def stop_once(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        if request.HasField("resume_from"):
            async for response in rest(request):
                yield response
        else:
            yield step(1)
            yield checkpoint(1)
            raise StageDrainingError("stopping", stage="denoiser")

    stages, denoiser = Encoders(), FakeDenoiser(stop_once, led(IMAGE_EMBEDS))
    await (await deploy([denoiser, denoiser], [stages.decoder], [stages.encoder])).events(REQUEST)
    assert [request.resume_from.step for request in denoiser.requests] == [0, 1]
    assert [list(request.keyframe_indices) for request in denoiser.requests] == [[0, 8]] * 2
    assert len({request.keyframe_latents.inline for request in denoiser.requests}) == 1
    assert len(stages.films) == 1


async def test_when_one_stage_refuses_them_the_other_stops(deploy: Deploy) -> None:
    stages = Encoders(InvalidRequestError.of("keyframes[1]", "can't be read"))
    deployment = await deploy([FakeDenoiser(rest, led(IMAGE_EMBEDS))], [stages.decoder], [stages.encoder])
    error = await failure(deployment.events(REQUEST))
    assert isinstance(error, InvalidRequestError)
    assert "keyframes[1]" in str(error)
    while not stages.cancelled:  # noqa: ASYNC110  only the encoder knows
        await asyncio.sleep(0.001)
