"""Laws of errors: each class crosses the wire as itself, and what is not ours becomes the nearest of ours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from safelight import errors
from safelight.errors import (
    CheckpointError,
    DeadlineExceededError,
    DownloadError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    SafelightError,
    StageUnavailableError,
    UnknownModelError,
    UnsupportedError,
    from_rpc_error,
    to_status,
)
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from safelight.v1.error_pb2 import ErrorReason
from services.common.channels import open_channel
from tests.serving import Serve, failing, failure

PROTO = Path(__file__).parents[4] / "protos/safelight/v1/error.proto"
CLASSES = [
    member
    for member in vars(errors).values()
    if inspect.isclass(member) and issubclass(member, SafelightError) and member is not SafelightError
    if member.__base__ is SafelightError or "reason" in vars(member)  # another arrives as its parent
]
REASONS = [reason for reason in ErrorReason.keys() if reason != "ERROR_REASON_UNSPECIFIED"]  # noqa: SIM118


def facts(error: SafelightError) -> tuple[Any, ...]:
    return (
        type(error),
        error.code,
        error.reason,
        str(error),
        error.violations,
        error.retry_after_seconds,
        error.metadata,
    )


def rpc_error(code: grpc.StatusCode, details: str, status: Status | None = None) -> grpc.aio.AioRpcError:
    pairs = [] if status is None else [("grpc-status-details-bin", status.SerializeToString())]
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*pairs), details)


async def over_the_wire(serve: Serve, error: SafelightError) -> SafelightError:
    running = await serve(failing(error))
    return await failure(EncoderServiceStub(running.channel).Encode(EncodeRequest()))


@pytest.mark.parametrize("error_class", CLASSES)
async def test_every_class_crosses_the_wire_with_all_it_says(error_class: type[SafelightError], serve: Serve) -> None:
    sent = error_class(
        "reduce «width», then send it again\n",
        violations=[FieldViolation("width", "is 7; must be a multiple of 8"), FieldViolation("steps", "is −1")],
        retry_after_seconds=1.1,
        stage="denoiser",
        capacity="64",
    )
    assert facts(await over_the_wire(serve, sent)) == facts(sent)


async def test_a_class_without_a_reason_of_its_own_arrives_as_its_parent(serve: Serve) -> None:
    arrived = await over_the_wire(serve, DownloadError("the hub has no such model"))
    assert type(arrived) is CheckpointError
    assert arrived.message == "the hub has no such model"


async def test_a_bare_error_arrives_without_violations_or_delay(serve: Serve) -> None:
    assert facts(await over_the_wire(serve, UnknownModelError("no such model"))) == facts(
        UnknownModelError("no such model")
    )


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_one_class_with_the_code_its_comment_names(reason: str) -> None:
    (error_class,) = (each for each in CLASSES if ErrorReason.Name(each.reason) == reason)
    comment = re.search(
        rf"// ([A-Z_]+): [^\n]+\n\s+// Example: [^\n]*\"{reason}\"[^\n]*\n\s+{reason} =", PROTO.read_text()
    )
    assert comment is not None
    assert comment.group(1) == error_class.code.name


async def test_a_long_error_is_cut_and_keeps_its_reason(serve: Serve) -> None:
    violations = [FieldViolation(f"ж{i}" * 200, "слишком длинно " * 200) for i in range(200)]
    sent = InvalidRequestError("слишком длинно " * 10_000, violations=violations, model="ж" * 10_000)
    received = await over_the_wire(serve, sent)
    assert type(received) is InvalidRequestError
    assert received.message.startswith("слишком длинно")
    assert received.message.endswith("…")
    assert received.violations[0].field.startswith("ж0ж0")


def test_the_errors_of_several_fields_are_one_error_that_names_each() -> None:
    error = InvalidRequestError.of_all([FieldViolation("width", "is 7"), FieldViolation("steps", "is 0")])
    assert str(error) == "width: is 7; steps: is 0"
    assert [violation.field for violation in error.violations] == ["width", "steps"]


async def test_an_unknown_method_is_unsupported(serve: Serve) -> None:
    running = await serve(failing(InternalError("not reached")))
    stream = DenoiserServiceStub(running.channel).Denoise(DenoiseRequest())
    assert type(await failure(stream.read())) is UnsupportedError


async def test_an_unreachable_server_is_an_unavailable_stage() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        assert type(await failure(EncoderServiceStub(channel).Encode(EncodeRequest()))) is StageUnavailableError


@pytest.mark.parametrize(
    ("code", "error_class"),
    [
        (grpc.StatusCode.CANCELLED, StageUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, StageUnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedError),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
)
def test_an_error_without_a_reason_is_told_by_its_code(code: grpc.StatusCode, error_class: type) -> None:
    error = from_rpc_error(rpc_error(code, "from a proxy"))
    assert (type(error), str(error)) == (error_class, "from a proxy")


def test_a_status_that_a_proxy_wrote_over_ours_is_told_by_its_code() -> None:
    ours = to_status(UnknownModelError("no such model"))
    assert type(from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "upstream reset", ours))) is StageUnavailableError


def test_details_that_are_no_status_are_passed_over() -> None:
    damaged = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff")),
        "gone",
    )
    assert type(from_rpc_error(damaged)) is StageUnavailableError


def test_metadata_may_have_any_names() -> None:
    info, packed = ErrorInfo(reason="ELSE", metadata={"message": "m", "violations": "v"}), AnyMessage()
    packed.Pack(info)
    error = from_rpc_error(
        rpc_error(grpc.StatusCode.UNAVAILABLE, "gone", Status(code=14, message="gone", details=[packed]))
    )
    assert error.metadata == {"message": "m", "violations": "v"}
