"""Every method of every service, fed with nonsense: always a status that says why, and nothing is left behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.v1 import decoder_service_pb2 as decoder
from safelight.v1.adapter_service_pb2 import ListAdaptersRequest, LoadAdapterRequest, UnloadAdapterRequest
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.generation_service_pb2 import CancelRequest, GenerateRequest
from safelight.v1.load_service_pb2 import GetLoadRequest
from safelight.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from safelight.v1.tensor_exchange_service_pb2 import PullRequest, ReleaseRequest
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorLease, TensorRef
from safelight.v1.work_pb2 import (
    MEDIA_ROLE_IMAGE,
    MEDIA_ROLE_MASK,
    MEDIA_ROLE_VIDEO,
    Checkpoint,
    GuidanceOptions,
    MediaInput,
    SamplingOptions,
    WorkContext,
)
from services.common.exchange import tensor_store
from services.denoiser.sampling.state import SamplerState, state_to_bytes
from tests.support.films import film_file, moving_square
from tests.support.fuzz_target import SECONDS, FuzzTarget, Outcome
from tests.support.spoiled_messages import mutilated, spoiled
from tests.support.stage_requests import conditioning, decode_request, denoise_request, from_picture, led_request
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v

OUTCOMES = set(grpc.StatusCode) - {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.fixture(scope="module")
def target(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzTarget]:
    """Its tensors are small, and travel under leases as if they were large."""
    folder = tmp_path_factory.mktemp("fuzz")
    paths = {"tiny": tiny_sd15, "tiny-wan": save_tiny_wan(folder / "wan"), "led": save_tiny_wan_i2v(folder / "led")}
    manifest = folder / "manifest.yaml"
    manifest.write_text(json.dumps({"models": [{"name": name, "path": str(path)} for name, path in paths.items()]}))
    target = FuzzTarget(str(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_store, "MAX_INLINE_BYTES", 256)
        target.start()
        yield target
        target.stop()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


FILM = film_file(moving_square(5, (16, 16)))


def lease(endpoint: str) -> TensorRef:
    header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[100_000])
    return TensorRef(header=header, lease=TensorLease(endpoint=endpoint, exchange_id="another", ticket="0f3a"))


def resumed() -> DenoiseRequest:
    request = denoise_request(steps=2)
    request.resume_from.CopyFrom(Checkpoint(step=1, sampler_state=lease("127.0.0.1:1")))
    return request


def with_leases() -> DenoiseRequest:
    request = denoise_request(steps=2)
    for part in (request.conditioning, request.negative_conditioning):
        part.tensors[0].tensor.CopyFrom(lease("127.0.0.1:1"))
    return request


@dataclass(frozen=True)
class Case:
    """A method of a server, and a request that it serves."""

    server: str
    method: str
    valid: Message = field(repr=False)
    served: bool = True


GENERATE = GenerateRequest(
    context=WorkContext(request_id="fuzz", tenant="alice"),
    model="tiny",
    prompt="a cat",
    width=64,
    height=64,
    sampling=SamplingOptions(sampler="euler", steps=2),
    guidance=GuidanceOptions(scale=2.0),
)
INPUTS = [
    MediaInput(role=MEDIA_ROLE_IMAGE, data=picture()),
    MediaInput(role=MEDIA_ROLE_MASK, data=picture()),
]
REPAINT = GenerateRequest(
    model="tiny", prompt="a cat", inputs=INPUTS, strength=0.5, sampling=GENERATE.sampling, guidance=GENERATE.guidance
)
LEAD = GenerateRequest(
    model="led",
    prompt="a cat",
    inputs=INPUTS[:1] * 2,
    width=64,
    height=64,
    num_frames=5,
    sampling=SamplingOptions(steps=2),
    guidance=GENERATE.guidance,
)
REMAKE = GenerateRequest(
    model="tiny-wan",
    prompt="a cat",
    inputs=[MediaInput(role=MEDIA_ROLE_VIDEO, data=FILM)],
    width=64,
    height=64,
    strength=0.5,
    sampling=SamplingOptions(steps=2),
)
CASES = {
    "encode": Case("encoder", "EncoderService/Encode", EncodeRequest(model="tiny", prompts=["a cat", ""])),
    "encode a picture": Case(
        "encoder",
        "EncoderService/Encode",
        EncodeRequest(model="led", prompts=["a cat"], inputs=INPUTS[:1], width=32, height=32),
    ),
    "denoise": Case("denoiser", "DenoiserService/Denoise", denoise_request(steps=2)),
    "denoise from a picture": Case(
        "denoiser",
        "DenoiserService/Denoise",
        from_picture(denoise_request(steps=2), torch.zeros(1, 4, 8, 8), 0.9, torch.ones(1, 1, 8, 8)),
    ),
    "denoise through keyframes": Case("denoiser", "DenoiserService/Denoise", led_request()),
    "denoise with leases": Case("denoiser", "DenoiserService/Denoise", with_leases(), served=False),
    "denoise resumed": Case("denoiser", "DenoiserService/Denoise", resumed(), served=False),
    "decode": Case("decoder", "DecoderService/Decode", decode_request(torch.zeros(1, 4, 8, 8))),
    "encode image": Case(
        "decoder", "DecoderService/EncodeImage", decoder.EncodeImageRequest(model="tiny", image=picture())
    ),
    "encode image with a mask": Case(
        "decoder",
        "DecoderService/EncodeImage",
        decoder.EncodeImageRequest(model="tiny", image=picture(), mask=picture(), width=64, height=128),
    ),
    "encode film": Case(
        "decoder",
        "DecoderService/EncodeFilm",
        decoder.EncodeFilmRequest(model="tiny-wan", film=FILM, width=16, height=16, num_frames=5),
    ),
    "encode keyframes": Case(
        "decoder",
        "DecoderService/EncodeFilm",
        decoder.EncodeFilmRequest(model="tiny-wan", keyframes=[picture()] * 2, width=16, height=16, num_frames=5),
    ),
    "generate": Case("gateway", "GenerationService/Generate", GENERATE),
    "generate from a picture": Case("gateway", "GenerationService/Generate", REPAINT),
    "generate through keyframes": Case("gateway", "GenerationService/Generate", LEAD),
    "generate from a film": Case("gateway", "GenerationService/Generate", REMAKE),
    "cancel": Case("gateway", "GenerationService/Cancel", CancelRequest(context=WorkContext(request_id="fuzz"))),
    "pull": Case("denoiser", "TensorExchangeService/Pull", PullRequest(ticket="0f3a"), served=False),
    "release": Case("denoiser", "TensorExchangeService/Release", ReleaseRequest(tickets=["0f3a"])),
    "list models": Case("gateway", "ModelService/ListModels", ListModelsRequest()),
    "get model": Case("encoder", "ModelService/GetModel", GetModelRequest(name="tiny")),
    "load adapter": Case(
        "gateway",
        "AdapterService/LoadAdapter",
        LoadAdapterRequest(model="tiny", name="toon", path="/nowhere.safetensors"),
        served=False,
    ),
    "load adapter at a stage": Case(
        "denoiser",
        "AdapterService/LoadAdapter",
        LoadAdapterRequest(model="tiny", name="toon", path="/nowhere.safetensors"),
        served=False,
    ),
    "list adapters": Case("gateway", "AdapterService/ListAdapters", ListAdaptersRequest(model="tiny")),
    "unload adapter": Case(
        "gateway", "AdapterService/UnloadAdapter", UnloadAdapterRequest(model="tiny", name="toon"), served=False
    ),
    "get load": Case("decoder", "LoadService/GetLoad", GetLoadRequest()),
}
every_method = pytest.mark.parametrize("name", CASES)
same_every_time = settings(
    max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_no_method_of_any_server_is_left_out(target: FuzzTarget) -> None:
    served = {service for server in target.cluster.servers for service in server.service.mounts}
    methods = {
        method.full_name for name in served for method in descriptor_pool.Default().FindServiceByName(name).methods
    }
    assert methods == {f"safelight.v1.{case.method.replace('/', '.')}" for case in CASES.values()}


def check(target: FuzzTarget, server: str, method: str, request: bytes) -> None:
    outcome = target.call(server, method, request)
    assert outcome.seconds < SECONDS, "hung"
    assert outcome.code in OUTCOMES or says_its_own_deadline(outcome), outcome


def says_its_own_deadline(outcome: Outcome) -> bool:
    """A request may carry a deadline that has passed; what the client's gRPC says of its own does not count."""
    return outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED and outcome.details != "Deadline Exceeded"


@every_method
@same_every_time
@given(data=st.data())
def test_a_spoiled_message_gets_a_status(target: FuzzTarget, name: str, data: st.DataObject) -> None:
    case = CASES[name]
    check(target, case.server, case.method, data.draw(spoiled(lambda: case.valid)).data)


@every_method
@same_every_time
@given(data=st.data())
def test_mutilated_bytes_get_a_status(target: FuzzTarget, name: str, data: st.DataObject) -> None:
    case = CASES[name]
    check(target, case.server, case.method, data.draw(mutilated(case.valid.SerializeToString)).data)


STATE = state_to_bytes(SamplerState(torch.zeros(1, 4, 8, 8), 1, (), 1))


@same_every_time
@given(data=st.data())
def test_a_mutilated_checkpoint_gets_a_status(target: FuzzTarget, data: st.DataObject) -> None:
    state = data.draw(mutilated(lambda: STATE)).data
    request = denoise_request(steps=2)
    header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[len(state)], fingerprint=target.denoiser_fingerprint)
    request.resume_from.CopyFrom(Checkpoint(step=1, sampler_state=TensorRef(header=header, inline=state)))
    check(target, "denoiser", "DenoiserService/Denoise", request.SerializeToString())


HUGE = b"a" * (2 * 1024 * 1024)
HUGE_REQUESTS: dict[str, tuple[str, Message]] = {
    "many prompts": ("encode", EncodeRequest(model="tiny", prompts=[""] * 500_000)),
    "long model name": ("encode", EncodeRequest(model=HUGE.decode(), prompts=["a cat"])),
    "many axes": ("denoise", DenoiseRequest(model="tiny", latent_shape=[2**62] * 100_000)),
    "many tokens": ("denoise", DenoiseRequest(model="tiny", conditioning=conditioning(0, 10_000))),
    "no picture": ("encode image", decoder.EncodeImageRequest(model="tiny", image=HUGE)),
    "no film": (
        "encode film",
        decoder.EncodeFilmRequest(model="tiny-wan", film=HUGE, width=16, height=16, num_frames=5),
    ),
    "many keyframes": (
        "encode keyframes",
        decoder.EncodeFilmRequest(model="tiny-wan", keyframes=[b"x"] * 500_000, width=16, height=16, num_frames=5),
    ),
    "no picture to start from": (
        "generate",
        GenerateRequest(model="tiny", inputs=[MediaInput(role=MEDIA_ROLE_IMAGE, data=HUGE)]),
    ),
    "no film to start from": (
        "generate from a film",
        GenerateRequest(model="tiny-wan", inputs=[MediaInput(role=MEDIA_ROLE_VIDEO, data=HUGE)]),
    ),
    "many seeds": ("generate", GenerateRequest(model="tiny", seeds=[1] * 500_000)),
    "long prompt": ("generate", GenerateRequest(model="tiny", prompt=HUGE.decode())),
    "many tickets": ("release", ReleaseRequest(tickets=["x"] * 500_000)),
    "long ticket": ("pull", PullRequest(ticket=HUGE.decode())),
}


@pytest.mark.parametrize("what", HUGE_REQUESTS)
def test_a_huge_message_gets_a_status(target: FuzzTarget, what: str) -> None:
    name, request = HUGE_REQUESTS[what]
    check(target, CASES[name].server, CASES[name].method, request.SerializeToString())


def test_after_all_that_everything_is_served_and_nothing_is_left(target: FuzzTarget) -> None:
    served = {name: case for name, case in CASES.items() if case.served}
    outcomes = {
        name: target.call(case.server, case.method, case.valid.SerializeToString()).code.name
        for name, case in served.items()
    }
    assert outcomes == dict.fromkeys(served, "OK")
    assert target.left_behind()["safelight_leases"] > 0
    assert target.until_quiet() == {}
