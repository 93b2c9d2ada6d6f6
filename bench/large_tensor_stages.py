"""Stages that compute nothing and hand each other large tensors: what is left of a deployment is its transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from safelight.v1 import decoder_service_pb2_grpc, denoiser_service_pb2_grpc, encoder_service_pb2_grpc, work_pb2
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResponse, DecodeResult
from safelight.v1.denoiser_service_pb2 import DenoiseProgress, DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription, ModelDescription
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, Conditioning, NamedTensor, TensorHeader, TensorRef
from services.common.exchange import BytesPayload, TensorReader
from services.common.request_context import Context
from services.common.server import Server, Service
from services.common.settings import StageSettings
from services.common.stage import Surroundings, make_surroundings, stage_mounts

MODEL = "large"
_DESCRIPTION = ModelDescription(
    name=MODEL,
    family="none",
    encoder=EncoderDescription(
        fingerprint="e", max_tokens=77, max_clip_skip=1, default_clip_skip=1, max_prompt_bytes=99
    ),
    denoiser=DenoiserDescription(
        fingerprint="d",
        latent_channels=4,
        samplers=["euler"],
        schedules=["scaled_linear"],
        default_steps=1,
        max_steps=1,
        default_guidance_scale=1,
        default_latent_width=8,
        default_latent_height=8,
        max_latent_area=64,
    ),
    decoder=DecoderDescription(
        fingerprint="v", scale_factor=8, latent_channels=4, formats=[work_pb2.OUTPUT_FORMAT_PNG]
    ),
)


@dataclass(frozen=True)
class _Exchange:
    """How a stage gives and takes tensors."""

    surroundings: Surroundings
    reader: TensorReader
    data: bytes

    async def give(self, fingerprint: str) -> TensorRef:
        header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[len(self.data)], fingerprint=fingerprint)
        return await self.surroundings.store.put(header, BytesPayload(self.data))

    async def take(self, ref: TensorRef) -> None:
        await self.reader.read(ref, "tensor")


class _Encoder(encoder_service_pb2_grpc.EncoderServiceServicer):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def Encode(self, request: EncodeRequest, context: Context) -> EncodeResponse:
        named = [NamedTensor(name="prompt_embeds", tensor=await self._exchange.give("e")) for _ in request.prompts]
        prompts = [EncodedPrompt(conditioning=Conditioning(tensors=[each])) for each in named]
        return EncodeResponse(prompts=prompts, timing=work_pb2.StageTiming(stage="encoder"))


class _Denoiser(denoiser_service_pb2_grpc.DenoiserServiceServicer):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def Denoise(self, request: DenoiseRequest, context: Context) -> AsyncIterator[DenoiseResponse]:
        for named in request.conditioning.tensors:
            await self._exchange.take(named.tensor)
        yield DenoiseResponse(progress=DenoiseProgress(step=1, steps=1))
        latents = await self._exchange.give("d")
        timing = work_pb2.StageTiming(stage="denoiser")
        yield DenoiseResponse(result=DenoiseResult(latents=latents, steps_run=1, timing=timing))


class _Decoder(decoder_service_pb2_grpc.DecoderServiceServicer):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def Decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[DecodeResponse]:
        await self._exchange.take(request.latents)
        file = b"a file"
        yield DecodeResponse(chunk=work_pb2.FileChunk(data=file, media_type="image/png", file_size=len(file)))
        timing = work_pb2.StageTiming(stage="decoder")
        yield DecodeResponse(result=DecodeResult(media_type="image/png", file_size=len(file), timing=timing))


_ADD: dict[str, tuple[str, Callable[[_Exchange, grpc.aio.Server], Any]]] = {
    "encoder": (
        "safelight.v1.EncoderService",
        lambda exchange, server: encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(
            _Encoder(exchange), server
        ),
    ),
    "denoiser": (
        "safelight.v1.DenoiserService",
        lambda exchange, server: denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(
            _Denoiser(exchange), server
        ),
    ),
    "decoder": (
        "safelight.v1.DecoderService",
        lambda exchange, server: decoder_service_pb2_grpc.add_DecoderServiceServicer_to_server(
            _Decoder(exchange),  # type: ignore[abstract]  # nothing asks it to encode a picture
            server,
        ),
    ),
}


async def start_stages(tensor_bytes: int) -> dict[str, Server]:
    """The three stages, each with leases of its own, so that every tensor travels as between processes."""
    return {stage: await _start(stage, bytes(tensor_bytes)) for stage in _ADD}


async def _start(stage: str, data: bytes) -> Server:
    settings = StageSettings(drain_seconds=0.0)
    surroundings = make_surroundings(settings)
    exchange = _Exchange(surroundings, surroundings.reader(settings), data)
    description = ModelDescription(name=MODEL, family="none")
    getattr(description, stage).CopyFrom(getattr(_DESCRIPTION, stage))
    service, add = _ADD[stage]
    mounts = stage_mounts(surroundings.store, [description], lambda: GetLoadResponse(capacity=16))
    mounts[service] = lambda server: add(exchange, server)

    async def start(address: str) -> None:
        surroundings.advertise(address)

    server = Server(Service(stage, mounts, (MODEL,), start, surroundings.close), settings, surroundings.metrics)
    await server.start()
    return server
