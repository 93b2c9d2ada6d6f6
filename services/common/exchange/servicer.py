"""The gRPC end of a store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from safelight.errors import InvalidRequestError
from safelight.v1 import tensor_exchange_service_pb2 as pb
from services.common.exchange.chunk_messages import chunks, write_chunk
from services.common.exchange.tensor_store import TensorStore
from services.common.request_context import Context

SERVICE = "safelight.v1.TensorExchangeService"


class TensorExchangeServicer:
    """Serves a store's tensors to consumers in other processes."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[memoryview]:
        """The tensor's bytes in pieces; each leaves as a PullResponse."""
        data = self._store.get_bytes(request.ticket)
        if not 0 <= request.offset <= data.nbytes:
            raise InvalidRequestError.of("offset", f"is {request.offset}; must be from 0 to {data.nbytes}")
        for chunk in chunks(data, request.offset):
            yield chunk

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._store.release(request.tickets)
        return pb.ReleaseResponse()


def mount_exchange(servicer: TensorExchangeServicer, server: grpc.aio.Server) -> None:
    """What the generated add_TensorExchangeServiceServicer_to_server does, with chunks written by hand."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Pull": grpc.unary_stream_rpc_method_handler(
            servicer.Pull,
            request_deserializer=pb.PullRequest.FromString,
            response_serializer=write_chunk,
        ),
        "Release": grpc.unary_unary_rpc_method_handler(
            servicer.Release,
            request_deserializer=pb.ReleaseRequest.FromString,
            response_serializer=pb.ReleaseResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
