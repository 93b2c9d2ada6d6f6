"""The exceptions of Safelight, and how they cross the wire.

    SafelightError
    ├── InvalidRequestError       INVALID_ARGUMENT     a field is wrong; `violations` names each
    ├── UnsupportedError          UNIMPLEMENTED        the contract has the field, the model does not serve it
    ├── UnknownModelError         NOT_FOUND            no replica serves that model
    ├── LeaseExpiredError         NOT_FOUND            the tensor is gone; make it again
    ├── TensorCorruptError        DATA_LOSS            bytes do not match their header or digest
    ├── NonFiniteError            FAILED_PRECONDITION  the model's output is NaN or infinite
    ├── CheckpointError           FAILED_PRECONDITION  weights can't be loaded
    ├── OverloadedError           RESOURCE_EXHAUSTED   the queue is full; nothing was started
    ├── OutOfMemoryError          RESOURCE_EXHAUSTED   the request does not fit the device
    ├── FingerprintMismatchError  FAILED_PRECONDITION  other weights than those the request was planned with
    ├── StageUnavailableError     UNAVAILABLE          no healthy replica of a stage
    │   ├── StageDrainingError    UNAVAILABLE          the replica stops and hands its requests back
    │   └── ModelRestartingError  UNAVAILABLE          its processes were lost and are started again; go on then
    ├── DeadlineExceededError     DEADLINE_EXCEEDED    time was up; the work was stopped
    │   └── DeadlineUnreachableError                   refused at once: the work would take longer than its deadline
    ├── RequestCancelledError     CANCELLED            the request was stopped on purpose
    └── InternalError             INTERNAL             a fault of Safelight, logged with the request id

A class carries its status code and its `ErrorReason`; servers raise these classes, one interceptor turns them into a
`google.rpc.Status` (`to_status`), and the SDK turns that back into the same class (`from_rpc_error`), never by reading
the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from safelight.v1 import error_pb2 as pb

ERROR_DOMAIN = "safelight"

# gRPC refuses a status whose metadata exceed 8 KiB, and the reason would be lost with it. A message counts up to four
# times: percent-encoded (three bytes for one) and within the details.
_MAX_MESSAGE_BYTES = 800
_MAX_DETAIL_BYTES = 200
_MAX_VIOLATIONS = 8


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field: its path in the request, and a sentence with the remedy."""

    field: str
    description: str


class SafelightError(Exception):
    """Base of all errors that Safelight raises on purpose.

    Args:
        message: a sentence that a person can act on.
        violations: the wrong fields, where there are any.
        retry_after_seconds: when to come back, where coming back helps.
        metadata: facts for programs, e.g. ``stage="denoiser"``.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[pb.ErrorReason.ValueType] = pb.ERROR_REASON_INTERNAL

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.metadata: Mapping[str, str] = metadata


class InvalidRequestError(SafelightError, ValueError):
    """A field of the request is wrong; `violations` names each one with its remedy."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The error for one wrong field."""
        return cls.of_all([FieldViolation(field, description)])

    @classmethod
    def of_all(cls, violations: Sequence[FieldViolation]) -> InvalidRequestError:
        """The error for several wrong fields at once."""
        sentence = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        return cls(sentence, violations=violations)


class UnsupportedError(SafelightError):
    """The contract has this field; the model or this release does not serve it."""

    code, reason = grpc.StatusCode.UNIMPLEMENTED, pb.ERROR_REASON_UNSUPPORTED


class UnknownModelError(SafelightError):
    """No replica serves the model that the request names."""

    code, reason = grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_UNKNOWN_MODEL


class UnknownAdapterError(SafelightError):
    """No adapter of that name is loaded, or another one than the request asks for."""

    code, reason = grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_UNKNOWN_ADAPTER


class LeaseExpiredError(SafelightError):
    """The tensor's lease has been released or has expired."""

    code, reason = grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_LEASE_EXPIRED


class TensorCorruptError(SafelightError):
    """A tensor's bytes do not match its header or digest."""

    code, reason = grpc.StatusCode.DATA_LOSS, pb.ERROR_REASON_TENSOR_CORRUPT


class NonFiniteError(SafelightError):
    """A model's output is NaN or infinite."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_NON_FINITE


class CheckpointError(SafelightError):
    """Weights can't be loaded: missing, cut short, or not of a known layout."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_BAD_CHECKPOINT


class DownloadError(CheckpointError):
    """Weights can't be fetched from their hub."""


class OverloadedError(SafelightError):
    """The queue is full; the request was not started and may be sent again after `retry_after_seconds`."""

    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL


class OutOfMemoryError(SafelightError):
    """The request does not fit the device's memory."""

    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OUT_OF_MEMORY


class StageUnavailableError(SafelightError):
    """No healthy replica of a stage is reachable."""

    code, reason = grpc.StatusCode.UNAVAILABLE, pb.ERROR_REASON_STAGE_UNAVAILABLE


class StageDrainingError(StageUnavailableError):
    """The replica is stopping and has handed the request back; go on elsewhere, from its last checkpoint."""

    reason = pb.ERROR_REASON_STAGE_DRAINING


class ModelRestartingError(StageUnavailableError):
    """The processes that share a model were lost and are being started again; go on from the last checkpoint."""

    reason = pb.ERROR_REASON_MODEL_RESTARTING


class FingerprintMismatchError(SafelightError):
    """The weights of a stage, or those that made a tensor, are not those that the request was planned with."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_FINGERPRINT_MISMATCH


class DeadlineExceededError(SafelightError):
    """Time was up; the work was stopped."""

    code, reason = grpc.StatusCode.DEADLINE_EXCEEDED, pb.ERROR_REASON_UNSPECIFIED


class DeadlineUnreachableError(DeadlineExceededError):
    """Refused at once: the work would take longer than its deadline allows; nothing was started."""

    reason = pb.ERROR_REASON_DEADLINE_UNREACHABLE


class RequestCancelledError(SafelightError):
    """The request was stopped on purpose: by a Cancel, or because nobody waited for it any more."""

    code, reason = grpc.StatusCode.CANCELLED, pb.ERROR_REASON_CANCELLED


class InternalError(SafelightError):
    """A fault of Safelight, logged by the server with the request id."""


_BY_REASON: dict[str, type[SafelightError]] = {
    pb.ErrorReason.Name(error.reason): error
    for error in (
        InvalidRequestError,
        UnsupportedError,
        UnknownModelError,
        UnknownAdapterError,
        LeaseExpiredError,
        TensorCorruptError,
        NonFiniteError,
        CheckpointError,
        OverloadedError,
        OutOfMemoryError,
        StageUnavailableError,
        StageDrainingError,
        ModelRestartingError,
        FingerprintMismatchError,
        DeadlineUnreachableError,
        RequestCancelledError,
        InternalError,
    )
}
# Errors that gRPC itself makes, or a proxy on the way, carry a code but no reason.
_BY_CODE: dict[grpc.StatusCode, type[SafelightError]] = {
    grpc.StatusCode.CANCELLED: StageUnavailableError,  # by the server, which stops; one's own is a CancelledError
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: StageUnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
}


def to_status(error: SafelightError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with ErrorInfo and, where they apply, BadRequest and RetryInfo.

    Long texts are cut and further violations left out, so that the whole fits gRPC's limit.
    """
    status = status_pb2.Status(code=error.code.value[0], message=_cut(error.message, _MAX_MESSAGE_BYTES))
    metadata = {name: _cut(value, _MAX_DETAIL_BYTES) for name, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=pb.ErrorReason.Name(error.reason), domain=ERROR_DOMAIN, metadata=metadata)
    status.details.append(_packed(info))
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(violation.field, _MAX_DETAIL_BYTES),
                description=_cut(violation.description, _MAX_DETAIL_BYTES),
            )
            for violation in error.violations[:_MAX_VIOLATIONS]
        ]
        status.details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> SafelightError:
    """The exception that a failed call stands for; the inverse of `to_status` for errors that Safelight raised."""
    code, message = error.code(), error.details() or str(error.code())
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has the three methods that from_call reads
        info, bad_request, retry = _unpacked(status or status_pb2.Status())
    except (ValueError, DecodeError):  # a proxy wrote another status over ours
        info, bad_request, retry = _unpacked(status_pb2.Status())
    error_class = _BY_REASON.get(info.reason) or _BY_CODE.get(code, InternalError)
    violations = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
    seconds = retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None
    known = error_class(message, violations=violations, retry_after_seconds=seconds)
    known.metadata = dict(info.metadata)  # not as arguments: the names are the sender's
    return known


def _cut(text: str, size: int) -> str:
    """The text in at most `size` bytes of UTF-8; where some is missing, it ends in an ellipsis."""
    encoded = text.encode(errors="replace")
    if len(encoded) > size:
        encoded = encoded[: size - len("…".encode())].decode(errors="ignore").encode() + "…".encode()
    return encoded.decode()


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _unpacked(
    status: status_pb2.Status,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo | None]:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry: error_details_pb2.RetryInfo | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
        elif not detail.Unpack(info):
            detail.Unpack(bad_request)
    return info, bad_request, retry
