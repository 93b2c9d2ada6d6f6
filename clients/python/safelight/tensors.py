"""Tensor messages to and from numpy arrays, bit for bit.

`ml_dtypes` supplies the element types that numpy lacks (bfloat16 and the 8-bit floats).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from safelight.errors import TensorCorruptError
from safelight.v1 import tensor_pb2 as pb

MAX_RANK = 8
"""Most axes of a tensor."""

MAX_INLINE_BYTES = 64 * 1024
"""Largest tensor that rides inside a message."""

NUMPY_DTYPES: dict[pb.DataType.ValueType, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_FLOAT8_E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    pb.DATA_TYPE_FLOAT8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
    pb.DATA_TYPE_BOOL: np.dtype("?"),
}
_MAX_ADDRESS = 2**63 - 1
_DATA_TYPES = {dtype: data_type for data_type, dtype in NUMPY_DTYPES.items()}


def byte_size(header: pb.TensorHeader) -> int:
    """Bytes that a header promises.

    Raises:
        TensorCorruptError: the header names no known dtype, or a shape that no array can have.
    """
    if header.dtype not in NUMPY_DTYPES:
        raise TensorCorruptError(f"dtype {header.dtype} is not one of the wire's data types", field="dtype")
    if len(header.shape) > MAX_RANK or any(extent < 0 for extent in header.shape):
        raise TensorCorruptError(
            f"shape {list(header.shape)} must have at most {MAX_RANK} axes, none negative", field="shape"
        )
    itemsize = NUMPY_DTYPES[header.dtype].itemsize
    # Strides must be countable also where an extent of 0 makes the tensor empty.
    if math.prod(max(extent, 1) for extent in header.shape) * itemsize > _MAX_ADDRESS:
        raise TensorCorruptError(f"shape {list(header.shape)} is larger than any memory", field="shape")
    return math.prod(header.shape) * itemsize


def check_size(header: pb.TensorHeader, size: int) -> None:
    """Raises TensorCorruptError unless `size` bytes are just what the header promises."""
    promised = byte_size(header)
    if promised != size:
        raise TensorCorruptError(
            f"shape {list(header.shape)} of {pb.DataType.Name(header.dtype)} needs {promised} bytes, not {size}: "
            "the tensor was cut short or its header is wrong; send it again",
            field="shape",
        )


def make_header(array: NDArray[Any], layout: str = "", fingerprint: str = "") -> pb.TensorHeader:
    """The header of an array, without a digest.

    Raises:
        TypeError: the wire has no such dtype.
    """
    data_type = _DATA_TYPES.get(array.dtype.newbyteorder("<"))
    if data_type is None:
        raise TypeError(f"dtype {array.dtype} can't be sent; the wire has {sorted(map(str, _DATA_TYPES))}")
    return pb.TensorHeader(dtype=data_type, shape=array.shape, layout=layout, fingerprint=fingerprint)


def to_bytes(array: NDArray[Any]) -> bytes:
    """An array's elements, little-endian, in C order."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def from_bytes(header: pb.TensorHeader, data: bytes | bytearray | memoryview) -> NDArray[Any]:
    """A read-only view of `data` as the array that the header describes; no copy.

    Raises:
        TensorCorruptError: the bytes do not fit the header.
    """
    check_size(header, memoryview(data).nbytes)
    array: NDArray[Any] = np.frombuffer(data, dtype=NUMPY_DTYPES[header.dtype]).reshape(_shape(header))
    array.flags.writeable = False
    return array


def _shape(header: pb.TensorHeader) -> Sequence[int]:
    return tuple(header.shape)
