"""Stages that compute nothing: a test says what each call of them answers. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from safelight.v1 import work_pb2 as work
from safelight.v1.decoder_service_pb2 import (
    DecodeRequest,
    DecodeResponse,
    DecodeResult,
    EncodeFilmRequest,
    EncodeFilmResponse,
    EncodeImageRequest,
    EncodeImageResponse,
)
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceServicer, add_DecoderServiceServicer_to_server
from safelight.v1.denoiser_service_pb2 import DenoiseProgress, DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceServicer, add_DenoiserServiceServicer_to_server
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription, ModelDescription
from safelight.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from safelight.v1.tensor_pb2 import (
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UINT8,
    Conditioning,
    NamedTensor,
    TensorHeader,
    TensorRef,
)
from services.common.channels import ChannelPool
from services.common.exchange import BytesPayload, TensorExchangeServicer, TensorReader, TensorStore, mount_exchange
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.request_context import Context
from services.common.server import Service

Encode = Callable[[EncodeRequest], Awaitable[EncodeResponse]]
Denoise = Callable[[DenoiseRequest], AsyncGenerator[DenoiseResponse, None]]
Decode = Callable[[DecodeRequest], AsyncGenerator[DecodeResponse, None]]
EncodeImage = Callable[[EncodeImageRequest], Awaitable[EncodeImageResponse]]
EncodeFilm = Callable[[EncodeFilmRequest], Awaitable[EncodeFilmResponse]]
FILE = b"the first half, the second half"
ENCODER = EncoderDescription(fingerprint="e", max_tokens=77, max_clip_skip=2, default_clip_skip=1, max_prompt_bytes=99)
DENOISER = DenoiserDescription(
    fingerprint="d",
    latent_channels=4,
    samplers=["euler"],
    schedules=["scaled_linear"],
    default_steps=10,
    max_steps=100,
    default_guidance_scale=5,
    default_latent_width=8,
    default_latent_height=8,
    max_latent_area=64,
    previews=True,
    inputs=[work.MEDIA_ROLE_IMAGE, work.MEDIA_ROLE_MASK],
)
DECODER = DecoderDescription(fingerprint="v", scale_factor=8, latent_channels=4, formats=[work.OUTPUT_FORMAT_PNG])


def tensor(data: bytes = bytes(4), dtype: Any = DATA_TYPE_FLOAT32, fingerprint: str = "") -> TensorRef:
    """A small tensor by value."""
    size = len(data) if dtype == DATA_TYPE_UINT8 else len(data) // 4
    return TensorRef(header=TensorHeader(dtype=dtype, shape=[size], fingerprint=fingerprint), inline=data)


def step(number: int, steps: int = 10) -> DenoiseResponse:
    """A step is done."""
    return DenoiseResponse(progress=DenoiseProgress(step=number, steps=steps, step_seconds=0.5, batch_size=1))


def checkpoint(number: int, state: TensorRef | None = None) -> DenoiseResponse:
    """A checkpoint after a step; its bytes tell which."""
    state = state or tensor(b"state after %d" % number, DATA_TYPE_UINT8, "d")
    return DenoiseResponse(checkpoint=work.Checkpoint(step=number, sampler_state=state))


def latent(determinism: Any = work.DETERMINISM_CLASS_EXACT) -> DenoiseResponse:
    """The result."""
    timing = work.StageTiming(stage="denoiser", compute_seconds=1.0)
    header = TensorHeader(dtype=DATA_TYPE_FLOAT32, shape=[1, 4, 8, 8])
    ref = TensorRef(header=header, inline=bytes(4 * 4 * 8 * 8))
    return DenoiseResponse(result=DenoiseResult(latents=ref, determinism=determinism, timing=timing))


async def rest(request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
    """Every step that is left, then the result."""
    for number in range(request.resume_from.step + 1, 11):
        yield step(number)
    yield latent()


async def whole_file(request: DecodeRequest) -> AsyncGenerator[DecodeResponse, None]:
    """The file in two chunks, then the result."""
    half = len(FILE) // 2
    yield DecodeResponse(chunk=work.FileChunk(data=FILE[:half], media_type="image/png", file_size=len(FILE)))
    yield DecodeResponse(chunk=work.FileChunk(data=FILE[half:], offset=half))
    timing = work.StageTiming(stage="decoder", compute_seconds=2.0)
    yield DecodeResponse(result=DecodeResult(media_type="image/png", file_size=len(FILE), timing=timing, sha256=b"h"))


async def encoded(request: EncodeRequest) -> EncodeResponse:
    """The same small tensor for every prompt."""
    conditioning = Conditioning(tensors=[NamedTensor(name="prompt_embeds", tensor=tensor())])
    prompts = [EncodedPrompt(conditioning=conditioning, token_count=3) for _ in request.prompts]
    return EncodeResponse(prompts=prompts, timing=work.StageTiming(stage="encoder", compute_seconds=0.25))


async def encoded_image(request: EncodeImageRequest) -> EncodeImageResponse:
    """The same small latent for every picture, and a mask if it has one."""
    response = EncodeImageResponse(
        latents=tensor(b"pict"), timing=work.StageTiming(stage="decoder", compute_seconds=1.5)
    )
    if request.mask:
        response.mask.CopyFrom(tensor(b"mask"))
    return response


async def encoded_film(request: EncodeFilmRequest) -> EncodeFilmResponse:
    """The same small latent for every film."""
    return EncodeFilmResponse(latents=tensor(b"film"), timing=work.StageTiming(stage="decoder", compute_seconds=2.5))


class _Encoder(EncoderServiceServicer):
    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    async def Encode(self, request: EncodeRequest, context: Context) -> EncodeResponse:
        return await self._encode(request)


@dataclass
class FakeEncoder:
    """An encoder that answers as the test says."""

    encode: Encode = encoded
    description: EncoderDescription = field(default_factory=lambda: ENCODER)

    def service(self) -> Service:
        """To be served."""
        mounts = _mounts(lambda: ModelDescription(name="fake", family="fake", encoder=self.description)) | {
            "safelight.v1.EncoderService": lambda server: add_EncoderServiceServicer_to_server(
                _Encoder(self.encode), server
            )
        }
        return Service("encoder", mounts, ("fake",))


@dataclass
class FakeDenoiser(DenoiserServiceServicer):
    """A denoiser that answers as the test says; it takes down what it was asked and what it was given to go on from.

    Args:
        denoise: the answer to a request.
        description: its part of the model.
    """

    denoise: Denoise
    description: DenoiserDescription = field(default_factory=lambda: DENOISER)
    requests: list[DenoiseRequest] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)
    cancelled: int = 0
    restarting: bool = False
    store: TensorStore = field(default_factory=lambda: TensorStore(60.0, Metrics()))
    _channels: ChannelPool = field(default_factory=ChannelPool)

    async def lease(self, data: bytes) -> TensorRef:
        """A tensor that this denoiser holds."""
        header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[len(data)], fingerprint="d")
        return await self.store.put(header, BytesPayload(data))

    async def Denoise(self, request: DenoiseRequest, context: Context) -> AsyncIterator[DenoiseResponse]:
        self.requests.append(request)
        if request.HasField("resume_from"):
            reader = TensorReader(self.store, self._channels, 2**30, Metrics())
            payload = await reader.read(request.resume_from.sampler_state, "resume_from.sampler_state")
            self.states.append(bytes(payload.buffer()))
        try:
            async with aclosing(self.denoise(request)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    def service(self) -> Service:
        """To be served."""
        exchange = TensorExchangeServicer(self.store)

        async def start(address: str) -> None:
            self.store.advertise(address)

        def describe() -> ModelDescription:
            return ModelDescription(name="fake", family="fake", denoiser=self.description, restarting=self.restarting)

        mounts = _mounts(describe) | {
            "safelight.v1.DenoiserService": lambda server: add_DenoiserServiceServicer_to_server(self, server),
            "safelight.v1.TensorExchangeService": lambda server: mount_exchange(exchange, server),
        }
        return Service("denoiser", mounts, ("fake",), start, self._channels.close)


class _Decoder(DecoderServiceServicer):
    def __init__(self, decode: Decode, encode_image: EncodeImage, encode_film: EncodeFilm) -> None:
        self._decode, self._encode_image, self._encode_film = decode, encode_image, encode_film

    async def Decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[DecodeResponse]:
        async with aclosing(self._decode(request)) as responses:
            async for response in responses:
                yield response

    async def EncodeImage(self, request: EncodeImageRequest, context: Context) -> EncodeImageResponse:
        return await self._encode_image(request)

    async def EncodeFilm(self, request: EncodeFilmRequest, context: Context) -> EncodeFilmResponse:
        return await self._encode_film(request)


@dataclass
class FakeDecoder:
    """A decoder that answers as the test says."""

    decode: Decode = whole_file
    encode_image: EncodeImage = encoded_image
    encode_film: EncodeFilm = encoded_film
    description: DecoderDescription = field(default_factory=lambda: DECODER)

    def service(self) -> Service:
        """To be served."""
        mounts = _mounts(lambda: ModelDescription(name="fake", family="fake", decoder=self.description)) | {
            "safelight.v1.DecoderService": lambda server: add_DecoderServiceServicer_to_server(
                _Decoder(self.decode, self.encode_image, self.encode_film), server
            )
        }
        return Service("decoder", mounts, ("fake",))


def _mounts(describe: Callable[[], ModelDescription]) -> dict[str, Callable[[Any], None]]:
    servicer = ModelServicer(lambda: [describe()])
    return {"safelight.v1.ModelService": lambda server: add_ModelServiceServicer_to_server(servicer, server)}
