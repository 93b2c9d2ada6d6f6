"""The messages of the chunk stream, written and read by hand.

A `PullResponse` has one field, so its wire form is a tag, a length and the bytes. Writing that here saves protobuf's
copies on either side; the wire stays valid protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from safelight.errors import TensorCorruptError
from safelight.v1 import tensor_exchange_service_pb2 as pb

CHUNK_BYTES = 1024 * 1024
_TAG = b"\x0a"  # field 1, length-delimited


def write_chunk(chunk: memoryview) -> bytes:
    """The serialised PullResponse with these bytes."""
    return b"".join((_TAG, _varint(chunk.nbytes), chunk))


def read_chunk(message: bytes) -> memoryview:
    """The bytes of a serialised PullResponse, viewed.

    Raises:
        TensorCorruptError: it is none.
    """
    end, length, shift = 1, 0, 0
    if message[:1] == _TAG:
        for byte in message[1:6]:
            length |= (byte & 0x7F) << shift
            shift, end = shift + 7, end + 1
            if byte < 0x80:
                break
    if end > 1 and end + length == len(message):
        return memoryview(message)[end:]
    try:  # another writer may have put it differently, e.g. an empty message
        return memoryview(pb.PullResponse.FromString(message).data)
    except DecodeError as error:
        raise TensorCorruptError("a chunk is no PullResponse message; pull it again") from error


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def chunks(data: memoryview, offset: int) -> Iterator[memoryview]:
    """The bytes from an offset on, in pieces for `write_chunk`."""
    for start in range(offset, data.nbytes, CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]
