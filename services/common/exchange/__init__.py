"""Tensor hand-off by reference (design, section 3): a producer's leases, a consumer's reads.

A tensor up to 64 KiB rides inline. A larger one stays with its producer under a lease; the consumer takes it without a
copy when both live in one process, through shared memory when both live on one host, and pulls it in chunks of 1 MiB
otherwise. Leases end by acknowledgement or by time.
"""

from services.common.exchange.buffer_pool import BufferPool
from services.common.exchange.chunk_messages import CHUNK_BYTES
from services.common.exchange.digests import digest
from services.common.exchange.payload import BytesPayload, Payload
from services.common.exchange.servicer import TensorExchangeServicer, mount_exchange
from services.common.exchange.shared_memory_server import SharedMemoryServer
from services.common.exchange.tensor_reader import TensorReader
from services.common.exchange.tensor_store import TensorStore

__all__ = [
    "CHUNK_BYTES",
    "BufferPool",
    "BytesPayload",
    "Payload",
    "SharedMemoryServer",
    "TensorExchangeServicer",
    "TensorReader",
    "TensorStore",
    "digest",
    "mount_exchange",
]
