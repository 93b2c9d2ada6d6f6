"""LoRAs over real servers: on every replica, from the first request on, until the last one ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from safelight.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    SafelightError,
    UnknownAdapterError,
    UnknownModelError,
    from_rpc_error,
)
from safelight.v1 import adapter_service_pb2 as pb
from safelight.v1.adapter_service_pb2_grpc import AdapterServiceStub
from safelight.v1.generation_service_pb2 import GenerateRequest, GenerateResponse
from safelight.v1.generation_service_pb2_grpc import GenerationServiceStub
from safelight.v1.work_pb2 import Adapter, OutputOptions, SamplingOptions
from services.common.channels import open_channel
from tests.serving import failure
from tests.support.cluster import Cluster, run_cluster
from tests.support.lora_files import kohya, save

UNET_LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_LAYER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
LAYERS = {UNET_LAYER: (64, 64), TEXT_LAYER: (64, 64)}


class Gateway:
    """Calls to a cluster's gateway."""

    def __init__(self, cluster: Cluster) -> None:
        assert cluster.gateway is not None
        self.cluster = cluster
        self.channel = open_channel(cluster.gateway.address)
        self.adapters, self.generation = AdapterServiceStub(self.channel), GenerationServiceStub(self.channel)

    async def load(self, file: Path, name: str = "style") -> pb.AdapterDescription:
        request = pb.LoadAdapterRequest(model="tiny", name=name, path=str(file))
        return (await self.adapters.LoadAdapter(request, timeout=30)).adapter

    async def names(self) -> list[str]:
        listing = await self.adapters.ListAdapters(pb.ListAdaptersRequest(model="tiny"), timeout=30)
        return [adapter.name for adapter in listing.adapters]

    async def unload(self, name: str = "style") -> None:
        await self.adapters.UnloadAdapter(pb.UnloadAdapterRequest(model="tiny", name=name), timeout=30)

    async def file(self, **options: Any) -> bytes:
        """The picture of a request."""
        events = [event async for event in self.generation.Generate(request(**options), timeout=30)]
        return b"".join(event.chunk.data for event in events)

    async def receipt(self, **options: Any) -> GenerateResponse:
        """The last event of a request."""
        return [event async for event in self.generation.Generate(request(**options), timeout=30)][-1]


def request(*adapters: Adapter, steps: int = 2, **options: Any) -> GenerateRequest:
    """A small picture."""
    return GenerateRequest(
        prompt="a cat",
        width=64,
        height=64,
        seeds=[1],
        sampling=SamplingOptions(steps=steps),
        output=OutputOptions(omit_metadata=True),
        adapters=options.pop("adapters", adapters),
        **options,
    )


@asynccontextmanager
async def running(manifest: str, **options: Any) -> AsyncIterator[Gateway]:
    async with run_cluster(manifest, **options) as cluster:
        gateway = Gateway(cluster)
        try:
            yield gateway
        finally:
            await gateway.channel.close()


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return save(kohya(LAYERS), tmp_path / "style.safetensors")


STYLE = [Adapter(name="style", scale=1.5)]


async def test_an_adapter_is_loaded_everywhere_and_changes_the_pictures_that_name_it(
    tiny_manifest: str, style: Path
) -> None:
    async with running(tiny_manifest, denoisers=2) as gateway:
        plain = await gateway.file()
        loaded = await gateway.load(style)
        assert sorted((report.stage, report.matched_keys) for report in loaded.reports) == [
            ("denoiser", 3),
            ("denoiser", 3),
            ("encoder", 3),
        ]
        assert len({report.replica for report in loaded.reports}) == 3
        assert (await gateway.load(style)).fingerprint == loaded.fingerprint
        assert await gateway.names() == ["style"]
        styled = await gateway.file(adapters=STYLE)
        assert styled != plain == await gateway.file()
        assert await gateway.file(adapters=[Adapter(name="style", scale=0)]) == plain
        await gateway.unload()
        assert await gateway.names() == []
        assert await gateway.file() == plain


async def test_the_receipt_names_the_adapters_with_their_fingerprints(tiny_manifest: str, style: Path) -> None:
    async with running(tiny_manifest) as gateway:
        loaded = await gateway.load(style)
        receipt = (await gateway.receipt(adapters=[Adapter(name="style")])).result.images[0]
        assert list(receipt.parameters.adapters) == [Adapter(name="style", scale=1, fingerprint=loaded.fingerprint)]
        other = Adapter(name="style", fingerprint="of another file")
        error = await failure(gateway.receipt(adapters=[other]))
        assert isinstance(error, UnknownAdapterError)


async def test_an_unknown_adapter_is_an_error_that_lists_those_loaded(tiny_manifest: str, style: Path) -> None:
    async with running(tiny_manifest) as gateway:
        await gateway.load(style)
        error = await failure(gateway.file(adapters=[Adapter(name="stile")]))
        assert isinstance(error, UnknownAdapterError)
        assert "'stile' of model 'tiny' is not loaded; loaded are: style" in error.message
        assert isinstance(await failure(gateway.unload("stile")), UnknownAdapterError)
        unknown = pb.LoadAdapterRequest(model="none", name="a", path=str(style))
        assert isinstance(await failure(gateway.adapters.LoadAdapter(unknown, timeout=30)), UnknownModelError)


async def test_what_one_replica_refuses_is_left_on_none(tiny_manifest: str, style: Path) -> None:
    async with running(tiny_manifest, denoiser={"max_adapters": 1}) as gateway:
        await gateway.load(style)
        error = await failure(gateway.load(style, "again"))
        assert isinstance(error, OutOfMemoryError)
        assert "max_adapters" in error.message
        assert await gateway.names() == ["style"]


async def test_a_name_stands_for_one_file(tiny_manifest: str, style: Path, tmp_path: Path) -> None:
    other = save(kohya(LAYERS, seed=99), tmp_path / "other.safetensors")
    async with running(tiny_manifest) as gateway:
        await gateway.load(style)
        error = await failure(gateway.load(other))
        assert isinstance(error, InvalidRequestError)
        assert "is taken" in error.message
        assert await gateway.names() == ["style"]


async def test_a_replica_that_comes_back_has_the_adapters_again(tiny_manifest: str, style: Path) -> None:
    async with running(tiny_manifest) as gateway:
        await gateway.load(style)
        styled = await gateway.file(adapters=STYLE)
        (stopped,) = gateway.cluster.denoisers
        await stopped.stop()
        gateway.cluster.denoisers[0] = await gateway.cluster.restart_denoiser(stopped, tiny_manifest)
        assert await _eventually(gateway, STYLE) == styled


async def _eventually(gateway: Gateway, adapters: list[Adapter]) -> bytes:
    """The picture, as soon as the gateway has found the replica and told it of the adapters."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await gateway.file(adapters=adapters)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)


async def _refusal(gateway: Gateway, adapters: list[Adapter]) -> SafelightError:
    """What a request is refused with, as soon as one is."""
    async with asyncio.timeout(30):
        while True:
            try:
                await gateway.file(adapters=adapters, steps=1)
            except grpc.aio.AioRpcError as error:
                return from_rpc_error(error)


async def test_unloading_waits_for_the_requests_that_use_the_adapter(tiny_manifest: str, style: Path) -> None:
    async with running(tiny_manifest) as gateway:
        await gateway.load(style)
        call = gateway.generation.Generate(request(*STYLE, steps=200), timeout=60)
        async for event in call:
            if event.HasField("progress") and event.progress.stage == "denoiser" and event.progress.step > 1:
                break
        unloading = asyncio.ensure_future(gateway.unload())
        assert isinstance(await _refusal(gateway, STYLE), UnknownAdapterError)
        assert not unloading.done()
        last = [event async for event in call][-1]
        assert last.result.images[0].steps_run == 200
        await unloading
        assert await gateway.names() == []


async def test_adapters_of_the_manifest_are_loaded_at_the_start(tiny_sd15: Path, style: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(f"models:\n  - {{name: tiny, path: {tiny_sd15}, adapters: [{{name: style, path: {style}}}]}}\n")
    async with running(str(manifest)) as gateway:
        assert await gateway.names() == ["style"]
        assert await gateway.file(adapters=STYLE) != await gateway.file()
