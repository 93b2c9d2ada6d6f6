"""The gateway's memory while large tensors flow from stage to stage: it passes references on, so it stays as it is.

    python -m bench.reference_flow

The gateway is the real one, in a process of its own; the stages compute nothing and hand each other tensors. Exits 1
when the gateway grows by as much as one tensor.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.large_tensor_stages import start_stages
from bench.server_process import ServerProcess
from safelight import AsyncClient
from services.common.server import Server

_WARM_UP_PICTURES = 10


@dataclass(frozen=True)
class Flow:
    """What flowed, and what the gateway's memory was, in bytes."""

    tensor_bytes: int
    moved_bytes: float
    before_bytes: int
    most_bytes: int


async def measure(tensor_bytes: int, pictures: int) -> Flow:
    """Pictures one after the other; a conditioning and a latent of that size flow for each."""
    stages = await start_stages(tensor_bytes)
    with tempfile.TemporaryDirectory() as folder:
        replicas = (f"--{stage}s={server.address}" for stage, server in stages.items())
        gateway = ServerProcess("gateway", Path(folder) / "gateway.log", *replicas)
        gateway.start()
        try:
            await asyncio.to_thread(gateway.wait_until_serving)
            return await _draw(gateway, stages, tensor_bytes, pictures)
        finally:
            await asyncio.to_thread(gateway.kill)
            for server in stages.values():
                await server.stop()


async def _draw(gateway: ServerProcess, stages: Mapping[str, Server], tensor_bytes: int, pictures: int) -> Flow:
    async with AsyncClient(gateway.address) as client:
        for seed in range(_WARM_UP_PICTURES):
            await client.generate("a cat", seed=seed)
        moved_before, before = _moved(stages), gateway.resident_bytes
        most = before
        for seed in range(pictures):
            await client.generate("a cat", seed=seed)
            most = max(most, gateway.resident_bytes)
    return Flow(tensor_bytes, _moved(stages) - moved_before, before, most)


def _moved(stages: Mapping[str, Server]) -> float:
    """Tensor bytes that the stages have received from each other."""
    samples = (
        server.metrics.registry.get_sample_value("safelight_tensor_bytes_total", {"path": path})
        for server in stages.values()
        for path in ("shared", "stream")
    )
    return sum(sample or 0.0 for sample in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--tensor-mib", type=int, default=64)
    arguments = parser.parse_args()
    flow = asyncio.run(measure(arguments.tensor_mib * 1024**2, arguments.pictures))
    grown = flow.most_bytes - flow.before_bytes
    sys.stdout.write(
        f"{flow.moved_bytes / 2**20:.0f} MiB flowed in tensors of {flow.tensor_bytes / 2**20:.0f} MiB; the gateway had "
        f"{flow.before_bytes / 2**20:.1f} MiB before and at most {grown / 2**20:.1f} MiB more meanwhile\n"
    )
    if flow.moved_bytes < 2 * arguments.pictures * flow.tensor_bytes or grown >= flow.tensor_bytes:
        sys.exit(1)


if __name__ == "__main__":
    main()
