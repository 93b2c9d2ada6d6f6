"""The far end of bench/transport.py: a process that holds tensors and gives them away in every way compared there.

    python -m bench.transport_holder SIZE...

prints one line of JSON, `Offer`'s fields, and serves until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import grpc
import numpy as np

from safelight.v1 import tensor_exchange_service_pb2 as pb
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader
from services.common.allocator import keep_freed_memory
from services.common.exchange import BytesPayload
from services.common.request_context import Context
from services.common.server import Server, Service
from services.common.settings import StageSettings
from services.common.stage import Surroundings, make_surroundings, stage_mounts

PLAIN = "bench.Plain"


@dataclass(frozen=True)
class Offer:
    """Where to get what: gRPC targets, the port of the raw socket, and the tensors' references by size, in hex."""

    plain_target: str
    raw_port: int
    references: dict[str, str]


def serve_raw(data: memoryview) -> int:
    """A TCP server that sends as many bytes as 8 bytes ask for; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(8):
            connection.sendall(data[: int.from_bytes(request, "little")])

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


async def serve_plain(data: memoryview) -> tuple[str, grpc.aio.Server]:
    """A gRPC server whose only method answers with so many bytes in one protobuf message; returns its target too."""

    async def get(request: pb.PullRequest, context: Context) -> pb.PullResponse:
        return pb.PullResponse(data=bytes(data[: request.offset]))

    handler = grpc.unary_unary_rpc_method_handler(
        get,
        request_deserializer=pb.PullRequest.FromString,
        response_serializer=pb.PullResponse.SerializeToString,
    )
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PLAIN, {"Get": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return f"127.0.0.1:{port}", server


UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


async def serve_exchange(settings: StageSettings, surroundings: Surroundings) -> Server:
    """What every stage mounts, and nothing else."""

    async def start(address: str) -> None:
        surroundings.advertise(address)

    mounts = stage_mounts(surroundings.store, [], GetLoadResponse)
    server = Server(Service("holder", mounts, (), start, surroundings.close), settings, surroundings.metrics)
    await server.start()
    return server


async def main(sizes: Sequence[int]) -> None:
    settings = StageSettings(lease_seconds=3600.0, drain_seconds=0.0)
    surroundings = make_surroundings(settings)
    server = await serve_exchange(settings, surroundings)
    data = memoryview(np.random.default_rng(0).bytes(max(sizes)))
    references = {}
    for size in sizes:
        header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size])
        ref = await surroundings.store.put(header, BytesPayload(data[:size]))
        references[str(size)] = ref.SerializeToString().hex()
    plain_target, plain_server = await serve_plain(data)
    offer = Offer(plain_target, serve_raw(data), references)
    sys.stdout.write(json.dumps(asdict(offer)) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await plain_server.stop(None)
    await server.stop()


if __name__ == "__main__":
    keep_freed_memory()
    asyncio.run(main([int(argument) for argument in sys.argv[1:]]))
