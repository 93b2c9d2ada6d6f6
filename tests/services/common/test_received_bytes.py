"""What counts as received: tensors leased by other processes, and nothing else."""

from __future__ import annotations

from safelight.v1.tensor_pb2 import DATA_TYPE_FLOAT32, TensorHeader, TensorLease, TensorRef
from services.common.received_bytes import received_bytes

HEADER = TensorHeader(dtype=DATA_TYPE_FLOAT32, shape=[2, 3])


def test_only_what_other_processes_leased_counts() -> None:
    inline = TensorRef(header=HEADER, inline=bytes(24))
    ours = TensorRef(header=HEADER, lease=TensorLease(exchange_id="here"))
    theirs = TensorRef(header=HEADER, lease=TensorLease(exchange_id="there"))
    assert received_bytes([inline, ours], "here") == 0
    assert received_bytes([inline, ours, theirs, theirs], "here") == 48
