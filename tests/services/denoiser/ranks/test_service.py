"""A denoiser whose model is on several ranks answers as one in a single process, and outlives the loss of a rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from safelight.errors import CheckpointError, InvalidRequestError, ModelRestartingError, SafelightError, from_rpc_error
from safelight.v1.adapter_service_pb2 import LoadAdapterRequest
from safelight.v1.adapter_service_pb2_grpc import AdapterServiceStub
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.model_service_pb2 import GetModelRequest
from safelight.v1.model_service_pb2_grpc import ModelServiceStub
from safelight.v1.tensor_pb2 import Conditioning, NamedTensor
from safelight.v1.work_pb2 import Adapter, GuidanceOptions, SamplingOptions
from services.common.stage import make_surroundings
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from tests.support.lora_files import dotted, save
from tests.support.rank_processes import rank_processes, until_gone
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser, checkpoints_of, relative_error
from tests.support.stage_requests import exact, inline, resumed, with_checkpoints
from tests.support.tiny_flux import CONTEXT_WIDTH, POOLED_WIDTH, save_tiny_flux
from tests.support.tiny_wan import TEXT_WIDTH, save_tiny_wan

SHAPES = {"flux": [16, 8, 6], "wan": [16, 2, 6, 8]}
WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "flux": {"prompt_embeds": (5, CONTEXT_WIDTH), "pooled_prompt_embeds": (POOLED_WIDTH,)},
    "wan": {"prompt_embeds": (5, TEXT_WIDTH)},
}
LAYERS = {
    "flux": {"transformer.transformer_blocks.0.attn.to_q": (64, 64)},
    "wan": {"diffusion_model.blocks.0.self_attn.q": (256, 256), "diffusion_model.blocks.0.ffn.0": (64, 256)},
}


def request(family: str, name: str, *, seed: int = 0, scale: float = 4.0, steps: int = 3) -> DenoiseRequest:
    """A small latent of a family's model of that name."""
    return DenoiseRequest(
        model=name,
        conditioning=conditioning(family, seed),
        negative_conditioning=conditioning(family, seed + 1000),
        latent_shape=SHAPES[family],
        sampling=SamplingOptions(steps=steps),
        guidance=GuidanceOptions(scale=scale),
        seed=seed,
    )


def conditioning(family: str, seed: int) -> Conditioning:
    """Random embeddings of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        tensors=[
            NamedTensor(name=name, tensor=inline(torch.randn(1, *shape, generator=generator)))
            for name, shape in WIDTHS[family].items()
        ]
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {"flux": save_tiny_flux(root / "flux"), "wan": save_tiny_wan(root / "wan")}


def write_manifest(path: Path, folder: Path, parallel: dict[str, Any]) -> str:
    """A model in one process, named "alone", and on ranks, named "shared"."""
    alone = {"name": "alone", "path": str(folder)}
    shared = {"name": "shared", "path": str(folder), "denoiser": {"parallel": parallel}}
    path.write_text(yaml.safe_dump({"models": [alone, shared]}))
    return str(path)


class StartShared(Protocol):
    """The `start_shared` fixture: starts a denoiser with a family's model in one process and on ranks."""

    async def __call__(self, family: str, parallel: dict[str, Any], **settings: Any) -> RunningDenoiser: ...


@pytest.fixture
def start_shared(start: StartDenoiser, folders: dict[str, Path], tmp_path: Path) -> StartShared:
    async def start_with(family: str, parallel: dict[str, Any], **settings: Any) -> RunningDenoiser:
        manifest = write_manifest(tmp_path / "manifest.yaml", folders[family], parallel)
        return await start(manifest=manifest, **settings)

    return start_with


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("flux", {"cfg": 2}),
        ("flux", {"ulysses": 2, "fsdp": True}),
        ("flux", {"tensor": 2}),
        ("wan", {"cfg": 2, "ulysses": 2, "fsdp": True}),
        ("wan", {"ring": 2}),
        ("wan", {"cfg": 2, "tensor": 2}),
    ],
    ids=str,
)
async def test_shared_work_gives_the_latents_of_one_process(
    start_shared: StartShared, tmp_path: Path, family: str, parallel: dict[str, Any]
) -> None:
    denoiser = await start_shared(family, parallel)
    style = await load_style(denoiser, save(dotted(LAYERS[family]), tmp_path / "style.safetensors"))
    varied = [(0, 4.0, []), (1, 1.0, []), (2, 3.0, [style])]
    alone, shared = [
        await asyncio.gather(
            *(
                denoiser.latents(styled(request(family, name, seed=seed, scale=scale), adapters))
                for seed, scale, adapters in varied
            )
        )
        for name in ("alone", "shared")
    ]
    assert max(map(relative_error, shared, alone)) < 1e-5
    plain = await denoiser.latents(request(family, "shared", seed=2, scale=3.0))
    assert relative_error(plain, shared[2]) > 1e-2


async def test_a_cancelled_request_stops_within_a_step_and_the_ranks_go_on(start_shared: StartShared) -> None:
    denoiser = await start_shared("flux", {"ulysses": 2})
    call = denoiser.stub.Denoise(request("flux", "shared", steps=1000))
    async for event in call:
        if event.progress.step == 3:
            call.cancel()
            break
    await denoiser.until_idle()
    latents = await denoiser.latents(request("flux", "shared", steps=2))
    wasted, useful = (
        denoiser.metric("safelight_denoise_steps_total", model="shared", outcome=outcome)
        for outcome in ("wasted", "useful")
    )
    assert wasted <= 1
    assert useful < 1000
    assert relative_error(latents, await denoiser.latents(request("flux", "alone", steps=2))) < 1e-5


async def load_style(denoiser: RunningDenoiser, file: Path) -> Adapter:
    """A LoRA that both models have loaded, and that both report alike; of its bytes a rank may hold a part."""
    stub = AdapterServiceStub(denoiser.channel)
    loaded = [
        (await stub.LoadAdapter(LoadAdapterRequest(model=name, name="style", path=str(file)), timeout=30)).adapter
        for name in ("alone", "shared")
    ]
    alone, shared = (each.reports[0] for each in loaded)
    assert loaded[0].fingerprint == loaded[1].fingerprint
    assert 0 < shared.bytes <= alone.bytes
    assert (shared.layout, shared.matched_keys) == (alone.layout, alone.matched_keys)
    assert shared.matched_keys > 0
    return Adapter(name="style", scale=1.5)


def styled(work: DenoiseRequest, adapters: Sequence[Adapter]) -> DenoiseRequest:
    """The request with adapters."""
    work.adapters.extend(adapters)
    return work


async def test_rows_that_are_computed_apart_are_exact(start_shared: StartShared) -> None:
    denoiser = await start_shared("wan", {"cfg": 2})
    alone, shared = [await denoiser.latents(exact(request("wan", name))) for name in ("alone", "shared")]
    assert torch.equal(alone, shared)


async def test_a_request_at_fault_is_told_so_and_the_ranks_go_on(start_shared: StartShared) -> None:
    denoiser = await start_shared("wan", {"cfg": 2})
    bad = request("wan", "shared")
    bad.conditioning.tensors[0].tensor.CopyFrom(inline(torch.ones(1, 5, TEXT_WIDTH + 1)))
    assert isinstance(await denoiser.failure(bad), InvalidRequestError)
    await denoiser.latents(request("wan", "shared"))
    assert denoiser.metric("safelight_rank_restarts_total", model="shared") == 0


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_after_the_loss_of_a_rank_a_request_goes_on_from_the_state_it_had(
    start_shared: StartShared, tmp_path: Path, blow: signal.Signals
) -> None:
    denoiser = await start_shared("wan", {"cfg": 2}, rank_answer_seconds=5.0)
    style = await load_style(denoiser, save(dotted(LAYERS["wan"]), tmp_path / "style.safetensors"))
    work = exact(with_checkpoints(styled(request("wan", "shared", steps=120), [style]), 100))
    undisturbed = await denoiser.latents(work)
    struck = rank_processes()
    events, error = await strike(denoiser, work, lambda: os.kill(struck[1], blow))
    assert isinstance(error, ModelRestartingError)
    assert error.metadata == {"stage": "denoiser", "model": "shared"}
    assert (await model(denoiser)).restarting
    assert await health(denoiser) == health_pb2.HealthCheckResponse.NOT_SERVING
    (checkpoint,) = checkpoints_of(events)
    assert checkpoint.step == [event.progress.step for event in events if event.HasField("progress")][-1]
    assert isinstance(await denoiser.failure(work), ModelRestartingError)
    while (await model(denoiser)).restarting:  # noqa: ASYNC110  only the description tells
        await asyncio.sleep(0.02)
    assert await health(denoiser) == health_pb2.HealthCheckResponse.SERVING
    assert torch.equal(await denoiser.latents(resumed(work, checkpoint)), undisturbed)
    assert denoiser.metric("safelight_rank_restarts_total", model="shared") == 1
    assert denoiser.metric("safelight_ranks", model="shared") == 2
    until_gone(struck)


async def test_when_a_denoiser_stops_its_ranks_end(start_shared: StartShared) -> None:
    denoiser = await start_shared("wan", {"cfg": 2})
    ranks = rank_processes()
    assert len(ranks) == 2
    await denoiser.server.stop()
    until_gone(ranks)


def test_ranks_that_can_not_load_are_an_error_that_says_why(tiny_sd15: Path, tmp_path: Path) -> None:
    settings = DenoiserSettings(
        manifest=write_manifest(tmp_path / "manifest.yaml", tiny_sd15, {"ring": 2}), device="cpu"
    )
    with pytest.raises(CheckpointError, match="can't be shared over ranks by ring"):
        build_denoiser(settings, make_surroundings(settings))
    assert rank_processes() == []


async def strike(
    denoiser: RunningDenoiser, work: DenoiseRequest, blow: Callable[[], None]
) -> tuple[list[DenoiseResponse], SafelightError]:
    """What happens to a request when something happens after its twentieth step, and what it fails with."""
    events: list[DenoiseResponse] = []
    try:
        async for event in denoiser.stub.Denoise(work, timeout=60):
            events.append(event)
            if event.progress.step == 20:
                blow()
    except grpc.aio.AioRpcError as error:
        return events, from_rpc_error(error)
    raise AssertionError("it did not fail")


async def model(denoiser: RunningDenoiser) -> ModelDescription:
    """The shared model as it is described at the moment."""
    return (await ModelServiceStub(denoiser.channel).GetModel(GetModelRequest(name="shared"), timeout=10)).model


async def health(denoiser: RunningDenoiser) -> Any:
    """Of the shared model."""
    stub: Any = health_pb2_grpc.HealthStub(denoiser.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service="denoiser/shared"))).status
