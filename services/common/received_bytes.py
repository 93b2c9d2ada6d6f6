"""How many bytes a stage took from other processes for a request; receipts tell it."""

from __future__ import annotations

from collections.abc import Iterable

from safelight.tensors import byte_size
from safelight.v1.tensor_pb2 import TensorRef


def received_bytes(refs: Iterable[TensorRef], exchange_id: str) -> int:
    """The bytes of the tensors that were leased by other processes than the one with this exchange id.

    Inline tensors came with the request itself and do not count.
    """
    leased = (ref for ref in refs if ref.WhichOneof("location") == "lease")
    return sum(byte_size(ref.header) for ref in leased if ref.lease.exchange_id != exchange_id)
