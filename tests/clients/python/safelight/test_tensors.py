"""Laws of the tensor codec: bits in, the same bits out; a header that lies is refused before memory is taken."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from safelight.errors import TensorCorruptError
from safelight.tensors import MAX_RANK, NUMPY_DTYPES, byte_size, from_bytes, make_header, to_bytes
from safelight.v1.tensor_pb2 import DataType, TensorHeader

FLOAT32, UINT8 = DataType.DATA_TYPE_FLOAT32, DataType.DATA_TYPE_UINT8
NAMES = {data_type: DataType.Name(data_type) for data_type in NUMPY_DTYPES}
data_types = pytest.mark.parametrize("data_type", NUMPY_DTYPES, ids=NAMES.get)


def every_pattern(dtype: np.dtype[Any]) -> NDArray[Any]:
    """All bit patterns of a one- or two-byte dtype, among them every NaN payload; samples of a wider one."""
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.itemsize <= 2:
        return np.arange(256**dtype.itemsize, dtype=f"<u{dtype.itemsize}").view(dtype)
    special = np.array([0, 1, 2**31, 0x7F800001, 0xFFC12345, 2**32 - 1, 2**63, 2**64 - 1], dtype="<u8")
    return np.concatenate([special, np.random.default_rng(0).integers(0, 2**64, 1000, dtype="<u8")]).view(dtype)


def round_trip(array: NDArray[Any]) -> NDArray[Any]:
    """Through the messages as another process would read them."""
    header = TensorHeader.FromString(make_header(array).SerializeToString())
    return from_bytes(header, to_bytes(array))


def bits(array: NDArray[Any]) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, array.dtype.name, array.tobytes()


def test_the_wire_has_a_numpy_dtype_for_every_data_type() -> None:
    assert set(NUMPY_DTYPES) == set(DataType.values()) - {DataType.DATA_TYPE_UNSPECIFIED}


@data_types
def test_every_bit_pattern_survives(data_type: DataType.ValueType) -> None:
    array = every_pattern(NUMPY_DTYPES[data_type])
    assert make_header(array).dtype == data_type
    assert bits(round_trip(array)) == bits(array)


@data_types
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (1, 2, 3, 4, 5), (1,) * MAX_RANK])
def test_every_shape_survives(data_type: DataType.ValueType, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, NUMPY_DTYPES[data_type])
    assert bits(round_trip(array)) == bits(array)


@given(
    shape=st.lists(st.integers(0, 4), max_size=5),
    data_type=st.sampled_from(sorted(NUMPY_DTYPES)),
    seed=st.integers(0, 9),
)
def test_any_array_survives(shape: list[int], data_type: DataType.ValueType, seed: int) -> None:
    dtype = NUMPY_DTYPES[data_type]
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    array = np.frombuffer(raw, dtype).reshape(shape)
    assert bits(round_trip(array)) == bits(array)


@pytest.mark.parametrize(
    "view",
    [
        np.arange(24.0, dtype="f4").reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(24, dtype="i4")[::-3],
        np.broadcast_to(np.float32(3), (2, 2)),
        np.arange(6, dtype=">f4"),
    ],
    ids=["transposed", "strided", "broadcast", "big-endian"],
)
def test_the_layout_in_memory_does_not_matter(view: NDArray[Any]) -> None:
    received = round_trip(view)
    np.testing.assert_array_equal(received, view)
    assert received.flags.c_contiguous


def test_a_header_says_the_layout_and_the_weights() -> None:
    header = make_header(np.zeros((1, 4, 8, 8), "f4"), "BCHW", "5f0c")
    assert header == TensorHeader(dtype=FLOAT32, shape=[1, 4, 8, 8], layout="BCHW", fingerprint="5f0c")


def test_received_bytes_are_viewed_and_read_only() -> None:
    data = bytearray(16)
    array = from_bytes(TensorHeader(dtype=FLOAT32, shape=[4]), data)
    assert np.shares_memory(array, np.frombuffer(data, "u1"))
    assert not array.flags.writeable


def test_a_buffer_is_measured_in_bytes_whatever_its_items() -> None:
    floats: Any = memoryview(bytes(16)).cast("f")
    np.testing.assert_array_equal(from_bytes(TensorHeader(dtype=FLOAT32, shape=[4]), floats), np.zeros(4, "f4"))


@pytest.mark.parametrize("dtype", ["f8", "c8", "i2", "U3", "O"])
def test_a_dtype_that_the_wire_lacks_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"dtype {np.dtype(dtype)} can't be sent"):
        make_header(np.zeros(1, dtype))


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ([3], "needs 12 bytes, not 16"),
        ([5], "needs 20 bytes, not 16"),
        ([0], "needs 0 bytes, not 16"),
        ([], "needs 4 bytes, not 16"),
        ([2**40], "needs 4398046511104 bytes"),
        ([-4], "none negative"),
        ([-2, -2], "none negative"),
        ([1] * (MAX_RANK + 1), "at most 8 axes"),
        ([2**62, 2**62], "larger than any memory"),
        ([0, 2**62, 2**62], "larger than any memory"),
    ],
)
def test_a_shape_that_lies_about_the_bytes_is_refused(shape: list[int], sentence: str) -> None:
    with pytest.raises(TensorCorruptError, match=sentence) as caught:
        from_bytes(TensorHeader(dtype=FLOAT32, shape=shape), bytes(16))
    assert caught.value.metadata == {"field": "shape"}


@pytest.mark.parametrize("data_type", [0, 99, -1])
def test_an_unknown_data_type_is_refused(data_type: int) -> None:
    header = TensorHeader.FromString(b"\x08" + varint(data_type) + b"\x12\x01\x04")
    with pytest.raises(TensorCorruptError, match=f"dtype {data_type} is not one") as caught:
        byte_size(header)
    assert caught.value.metadata == {"field": "dtype"}


def varint(value: int) -> bytes:
    """A protobuf varint of an enum's number; negative ones take ten bytes."""
    value &= 2**64 - 1
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_no_shape_is_measured_beyond_memory_or_below_nothing(shape: list[int]) -> None:
    with suppress(TensorCorruptError):
        assert 0 <= byte_size(TensorHeader(dtype=UINT8, shape=shape)) < 2**63
