"""Laws of the chunks: they are protobuf on the wire, whoever wrote them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import TensorCorruptError
from safelight.v1.tensor_exchange_service_pb2 import PullResponse
from services.common.exchange.chunk_messages import CHUNK_BYTES, chunks, read_chunk, write_chunk

sizes = pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21])


@sizes
def test_a_chunk_is_what_protobuf_would_write(size: int) -> None:
    message = write_chunk(memoryview(bytes(size)))
    assert PullResponse.FromString(message) == PullResponse(data=bytes(size))
    assert message == PullResponse(data=bytes(size)).SerializeToString() or size == 0


@sizes
def test_what_protobuf_writes_is_read(size: int) -> None:
    assert read_chunk(PullResponse(data=bytes(size)).SerializeToString()) == bytes(size)


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (b"", b""),
        (b"\x0a\x02ab\x0a\x01c", b"c"),
        (b"\x10\x05\x0a\x01c", b"c"),
        (b"\x0a\x81\x00c", b"c"),
        (b"\x0a\x01c\x10\x05", b"c"),
    ],
    ids=["empty", "field twice", "unknown field first", "longer varint", "unknown field last"],
)
def test_every_valid_encoding_is_read(message: bytes, data: bytes) -> None:
    assert bytes(read_chunk(message)) == data


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda rest: b"\x0a" + rest))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(message: bytes) -> None:
    try:
        read = bytes(read_chunk(message))
    except TensorCorruptError:
        read = None
    try:
        expected = PullResponse.FromString(message).data
    except DecodeError:
        expected = None
    assert read == expected


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
def test_the_chunks_from_an_offset_are_the_bytes_from_there(offset: int) -> None:
    data = memoryview(bytes(range(256)) * (8 * 1024) + b"end")
    pieces = list(chunks(data, offset))
    assert b"".join(pieces) == data[offset:]
    assert all(0 < piece.nbytes <= CHUNK_BYTES for piece in pieces)
