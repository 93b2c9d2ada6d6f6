"""A slow decoder slows admission: latents do not pile up in front of it, the excess is refused, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gateway.service import build_gateway, make_surroundings
from gateway.settings import GatewaySettings
from safelight import AsyncClient, GenerationResult, OverloadedError, RetryPolicy
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResponse, DecodeResult
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceServicer, add_DecoderServiceServicer_to_server
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription, ModelDescription
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader
from safelight.v1.work_pb2 import OUTPUT_FORMAT_PNG, FileChunk
from services.common.exchange import BytesPayload, TensorStore
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve, streaming, unary

MODEL = ModelDescription(
    name="tiny",
    encoder=EncoderDescription(default_clip_skip=1, max_clip_skip=1, max_prompt_bytes=100),
    denoiser=DenoiserDescription(
        latent_channels=4,
        samplers=["euler"],
        schedules=["karras"],
        default_steps=4,
        max_steps=100,
        default_latent_width=64,
        default_latent_height=64,
        max_latent_area=65536,
    ),
    decoder=DecoderDescription(scale_factor=8, latent_channels=4, formats=[OUTPUT_FORMAT_PNG]),
)
LATENT_BYTES = 128 * 1024
DENOISE_SECONDS, DECODE_SECONDS = 0.001, 0.01
CAPACITY = 4
"""Pictures that the decoder takes, one of them at a time."""


@dataclass
class Stages:
    """An encoder, a denoiser and a decoder ten times slower than that; counts the latents between the last two."""

    metrics: Metrics = field(default_factory=Metrics)
    store: TensorStore = field(init=False)
    undecoded: int = 0
    most_undecoded: int = 0
    made: Counter[str] = field(default_factory=Counter)
    device: asyncio.Lock = field(default_factory=asyncio.Lock)
    most_leased: float = 0.0

    def __post_init__(self) -> None:
        self.store = TensorStore(60.0, self.metrics)

    @property
    def leased(self) -> float:
        """Latents that the denoiser holds."""
        return self.metrics.registry.get_sample_value("safelight_leases") or 0.0

    async def encode(self, request: EncodeRequest) -> EncodeResponse:
        self.made["encode"] += 1
        return EncodeResponse(prompts=[EncodedPrompt(), EncodedPrompt()])

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseResponse, None]:
        self.made["denoise"] += 1
        self.undecoded += 1
        self.most_undecoded = max(self.undecoded, self.most_undecoded)
        await asyncio.sleep(DENOISE_SECONDS)  # the work itself
        header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[1, 4, 64, LATENT_BYTES // 256])
        latents = await self.store.put(header, BytesPayload(bytes(LATENT_BYTES)))
        self.most_leased = max(self.leased, self.most_leased)
        yield DenoiseResponse(result=DenoiseResult(latents=latents, steps_run=4))

    async def decode(self, request: DecodeRequest) -> AsyncIterator[DecodeResponse]:
        async with self.device:
            await asyncio.sleep(DECODE_SECONDS)  # the work itself
        self.made["decode"] += 1
        self.undecoded -= 1
        yield DecodeResponse(chunk=FileChunk(data=b"picture", media_type="image/png", file_size=7))
        yield DecodeResponse(result=DecodeResult(media_type="image/png", file_size=7))


class Decoder(DecoderServiceServicer):
    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    async def Decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[DecodeResponse]:
        async for response in self._stages.decode(request):
            yield response


async def start(serve: Serve, stages: Stages, **settings: Any) -> str:
    """The address of a gateway in front of the stages."""
    decoder = "safelight.v1.DecoderService"
    decode_only = Decoder(stages)  # type: ignore[abstract]
    services = {
        "encoder": unary(stages.encode).mounts,
        "denoiser": streaming(stages.denoise).mounts,
        "decoder": {decoder: lambda server: add_DecoderServiceServicer_to_server(decode_only, server)},
    }
    addresses: dict[str, Any] = {}
    for stage, mounts in services.items():
        capacity = CAPACITY if stage == "decoder" else 1000
        common = stage_mounts(stages.store, [MODEL], partial(GetLoadResponse, capacity=capacity))
        running = await serve(Service(stage, mounts | common, ("tiny",)))
        addresses[f"{stage}s"] = (running.server.address,)
        if stage == "denoiser":
            stages.store.advertise(running.server.address)
    gateway = GatewaySettings(**addresses, **settings)
    return (await serve(build_gateway(gateway, make_surroundings(gateway)), gateway)).server.address


async def test_latents_do_not_pile_up_in_front_of_a_slow_decoder_and_no_request_is_lost(serve: Serve) -> None:
    stages = Stages()
    async with AsyncClient(await start(serve, stages)) as client:
        results = await asyncio.gather(*(client.generate("a cat", num_images=2) for _ in range(20)))
    assert all(isinstance(result, GenerationResult) for result in results)
    assert stages.made == {"encode": 20, "denoise": 40, "decode": 40}
    assert stages.most_undecoded == CAPACITY
    assert stages.most_leased <= 2 * CAPACITY  # acknowledgements may still be on their way
    while stages.leased:  # noqa: ASYNC110  only the metric tells
        await asyncio.sleep(0.005)


async def test_the_excess_is_refused_with_a_time_to_come_back_before_any_stage_is_called(serve: Serve) -> None:
    stages = Stages()
    address = await start(serve, stages, max_images_in_flight=10)
    async with AsyncClient(address, retry=RetryPolicy.none) as client:
        outcomes = await asyncio.gather(*(client.generate("a cat") for _ in range(30)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    served = [outcome for outcome in outcomes if isinstance(outcome, GenerationResult)]
    assert len(refused) + len(served) == 30
    assert len(served) >= 10
    assert refused
    assert all(error.retry_after_seconds for error in refused)
    assert stages.made["encode"] == stages.made["denoise"] == len(served)
    assert stages.most_undecoded <= CAPACITY


async def test_those_refused_are_served_when_they_come_back(serve: Serve) -> None:
    stages = Stages()
    policy = RetryPolicy(first_wait_seconds=0.1)
    async with AsyncClient(await start(serve, stages, max_images_in_flight=10), retry=policy) as client:
        results = await asyncio.gather(*(client.generate("a cat") for _ in range(20)))
    assert len(results) == stages.made["decode"] == 20
    assert stages.most_undecoded <= CAPACITY
