"""How fast tensors move between two processes, each way in turns: ours against memcpy, a raw socket, one large message.

    python -m bench.transport

The stream and the shared memory are what a stage does when it reads a reference: bytes in a pooled buffer, digest
checked. The raw socket and the memcpy only move bytes, into memory that is used again and again; the plain call is one
protobuf message with a bytes field through gRPC, its size limit lifted, its bytes taken as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from bench.transport_holder import PLAIN, UNLIMITED, Offer
from safelight.v1 import tensor_exchange_service_pb2 as pb
from safelight.v1.tensor_pb2 import TensorRef
from services.common.allocator import keep_freed_memory
from services.common.channels import ChannelPool
from services.common.exchange import TensorReader, TensorStore
from services.common.metrics import Metrics

SIZES = (64 * 1024 + 1, 256 * 1024, 1024**2, 4 * 1024**2, 16 * 1024**2, 64 * 1024**2)
"""From just above what rides inline."""
LEAST_BYTES_A_SAMPLE = 4 * 1024**2
Move = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """Median GB/s of each way for one size."""

    size: int
    speed: dict[str, float]


class Mover:
    """Fetches tensors from a holder in each way."""

    def __init__(self, offer: Offer, channels: ChannelPool, metrics: Metrics) -> None:
        self._offer = offer
        self._metrics = metrics
        self._reader = TensorReader(TensorStore(60.0, metrics), channels, 2**40, metrics)
        self._plain_channel = grpc.aio.insecure_channel(offer.plain_target, options=UNLIMITED)
        self._plain = self._plain_channel.unary_unary(
            f"/{PLAIN}/Get", pb.PullRequest.SerializeToString, pb.PullResponse.FromString
        )
        self._raw = socket.create_connection(("127.0.0.1", offer.raw_port))
        largest = max(map(int, offer.references))
        self._source, self._target = np.ones(largest, np.uint8), np.zeros(largest, np.uint8)
        self._landing: Any = self._target

    def ways(self) -> dict[str, Move]:
        return {
            "memcpy": self.memcpy,
            "raw socket": self.raw_socket,
            "shared": self.shared,
            "stream": self.stream,
            "plain": self.plain,
        }

    async def memcpy(self, size: int) -> None:
        np.copyto(self._target[:size], self._source[:size])

    async def raw_socket(self, size: int) -> None:
        self._raw.sendall(size.to_bytes(8, "little"))
        view, filled = memoryview(self._landing), 0
        while filled < size:
            filled += self._raw.recv_into(view[filled:size])

    async def shared(self, size: int) -> None:
        await self._read(self._ref(size), "shared")

    async def stream(self, size: int) -> None:
        ref = self._ref(size)
        ref.lease.host = ""
        await self._read(ref, "stream")

    async def plain(self, size: int) -> None:
        response = await self._plain(pb.PullRequest(offset=size))
        assert len(response.data) == size

    def _ref(self, size: int) -> TensorRef:
        return TensorRef.FromString(bytes.fromhex(self._offer.references[str(size)]))

    async def _read(self, ref: TensorRef, path: str) -> None:
        before = self._moved(path)
        await self._reader.read(ref, "tensor")
        if self._moved(path) == before:
            raise RuntimeError(f"the tensor did not come by the {path} way")

    def _moved(self, path: str) -> float:
        return self._metrics.registry.get_sample_value("safelight_tensor_bytes_total", {"path": path}) or 0.0

    async def close(self) -> None:
        self._raw.close()
        await self._plain_channel.close()


async def measure(mover: Mover, sizes: Sequence[int], rounds: int) -> list[Row]:
    """All ways in turns, size by size; the first round warms up and is not counted."""
    rows = []
    for size in sizes:
        speeds: dict[str, list[float]] = {name: [] for name in mover.ways()}
        for _ in range(rounds + 1):
            for name, move in mover.ways().items():
                speeds[name].append(await _speed(move, size))
        rows.append(Row(size, {name: statistics.median(values[1:]) for name, values in speeds.items()}))
    return rows


async def _speed(move: Move, size: int) -> float:
    """GB/s of some MiB, moved one tensor after the other."""
    count = max(1, LEAST_BYTES_A_SAMPLE // size)
    started = time.perf_counter()
    for _ in range(count):
        await move(size)
    return count * size / (time.perf_counter() - started) / 1e9


def table(rows: Sequence[Row]) -> str:
    """GB/s, and the ratios that matter."""
    names = list(rows[0].speed)
    ratios = (("stream", "raw socket"), ("stream", "plain"), ("shared", "memcpy"))
    heads = ["KiB", *names, *(f"{ours}/{peer}" for ours, peer in ratios)]
    lines = [" | ".join(heads)]
    for row in rows:
        speeds = [f"{row.speed[name]:.2f}" for name in names]
        lines.append(
            " | ".join([f"{row.size // 1024}", *speeds, *(f"{row.speed[a] / row.speed[b]:.2f}" for a, b in ratios)])
        )
    return "\n".join(lines)


async def run(sizes: Sequence[int], rounds: int) -> list[Row]:
    command = [sys.executable, "-m", "bench.transport_holder", *map(str, sizes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # noqa: ASYNC220
        assert holder.stdin is not None
        assert holder.stdout is not None
        offer = Offer(**json.loads(holder.stdout.readline()))
        channels, metrics = ChannelPool(), Metrics()
        mover = Mover(offer, channels, metrics)
        rows = await measure(mover, sizes, rounds)
        await mover.close()
        await channels.close()
        holder.stdin.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--largest-mib", type=int, default=64)
    arguments = parser.parse_args()
    keep_freed_memory()
    sizes = [size for size in SIZES if size <= arguments.largest_mib * 1024**2]
    sys.stdout.write(table(asyncio.run(run(sizes, arguments.rounds))) + "\n")


if __name__ == "__main__":
    main()
