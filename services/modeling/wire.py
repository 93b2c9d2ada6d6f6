"""Tensor messages to and from torch, bit for bit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import NonFiniteError, TensorCorruptError
from safelight.tensors import check_size
from safelight.v1 import tensor_pb2 as pb
from services.common.exchange import Payload, TensorReader

TORCH_DTYPES: dict[pb.DataType.ValueType, torch.dtype] = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_FLOAT16: torch.float16,
    pb.DATA_TYPE_BFLOAT16: torch.bfloat16,
    pb.DATA_TYPE_FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.DATA_TYPE_FLOAT8_E5M2: torch.float8_e5m2,
    pb.DATA_TYPE_INT64: torch.int64,
    pb.DATA_TYPE_INT32: torch.int32,
    pb.DATA_TYPE_UINT8: torch.uint8,
    pb.DATA_TYPE_BOOL: torch.bool,
}
_CHECKED_ON_THE_LOOP_BYTES = 1024 * 1024
DATA_TYPES = {dtype: data_type for data_type, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TorchPayload:
    """A tensor as its producer computes with it; its bytes are made when a consumer in another process asks."""

    tensor: Tensor

    def buffer(self) -> memoryview:
        flat = self.tensor.detach().to("cpu").contiguous().view(-1)
        if flat.numel() == 0:
            return memoryview(b"")
        array: Any = flat.view(torch.uint8).numpy()
        return memoryview(array)


def make_header(tensor: Tensor, layout: str = "", fingerprint: str = "") -> pb.TensorHeader:
    """The header of a tensor, without a digest.

    Raises:
        TypeError: the wire has no such dtype.
    """
    if tensor.dtype not in DATA_TYPES:
        raise TypeError(f"{tensor.dtype} can't be sent; the wire has {sorted(map(str, DATA_TYPES))}")
    return pb.TensorHeader(
        dtype=DATA_TYPES[tensor.dtype], shape=list(tensor.shape), layout=layout, fingerprint=fingerprint
    )


def to_tensor(header: pb.TensorHeader, payload: Payload) -> Tensor:
    """The tensor of a payload that came with this header: taken as it is in process, viewed (not copied) otherwise.

    Raises:
        TensorCorruptError: the bytes do not fit the header.
    """
    if isinstance(payload, TorchPayload):
        check_header(header, payload.tensor)
        return payload.tensor
    data = payload.buffer()
    check_size(header, data.nbytes)
    dtype = TORCH_DTYPES[header.dtype]
    if data.nbytes == 0:
        return torch.empty(tuple(header.shape), dtype=dtype)
    # torch wants a writable buffer; bytes of an inline tensor are small, so those alone are copied.
    writable = bytearray(data) if data.readonly else data
    return torch.frombuffer(writable, dtype=dtype).reshape(tuple(header.shape))


def check_header(header: pb.TensorHeader, tensor: Tensor) -> None:
    """Raises TensorCorruptError unless the header describes the tensor."""
    if (TORCH_DTYPES.get(header.dtype), tuple(header.shape)) != (tensor.dtype, tuple(tensor.shape)):
        raise TensorCorruptError(
            f"the header promises {list(header.shape)} of {pb.DataType.Name(header.dtype)}, the tensor is "
            f"{list(tensor.shape)} of {tensor.dtype}",
            field="shape",
        )


async def read_tensor(reader: TensorReader, ref: pb.TensorRef, field: str) -> Tensor:
    """The tensor of a reference, wherever it lies; `field` names it in errors.

    Raises:
        TensorCorruptError, LeaseExpiredError, StageUnavailableError: see `TensorReader.read`.
        NonFiniteError: it is a float tensor with NaN or infinity.
    """
    payload = await reader.read(ref, field)
    try:
        tensor = to_tensor(ref.header, payload)
    except TensorCorruptError as error:
        raise TensorCorruptError(f"{field}: {error.message}", field=field) from error
    if tensor.nbytes <= _CHECKED_ON_THE_LOOP_BYTES:
        check_finite(tensor, field)
    else:
        await asyncio.to_thread(check_finite, tensor, field)
    return tensor


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises NonFiniteError if a float tensor holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise NonFiniteError(
            f"{what} is not finite (NaN or infinity): check the weights' dtype (float16 overflows on some models; "
            "bfloat16 or float32 does not) and the adapters",
            field=what,
        )
