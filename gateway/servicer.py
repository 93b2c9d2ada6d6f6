"""GenerationService and AdapterService: unpack, call, pack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from gateway.adapters import Adapters
from gateway.requests import Requests
from safelight.v1 import adapter_service_pb2, adapter_service_pb2_grpc
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import generation_service_pb2_grpc as pb_grpc
from services.common.request_context import Context


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The public API."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with aclosing(self._requests.attach(request, context.time_remaining())) as events:
            async for event in events:
                yield event

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self._requests.cancel(request.context)
        return pb.CancelResponse()


class AdapterServicer(adapter_service_pb2_grpc.AdapterServiceServicer):
    """The LoRAs of all replicas."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def LoadAdapter(
        self, request: adapter_service_pb2.LoadAdapterRequest, context: Context
    ) -> adapter_service_pb2.LoadAdapterResponse:
        return adapter_service_pb2.LoadAdapterResponse(adapter=await self._adapters.load(request))

    async def ListAdapters(
        self, request: adapter_service_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_service_pb2.ListAdaptersResponse:
        return adapter_service_pb2.ListAdaptersResponse(adapters=await self._adapters.listing(request.model))

    async def UnloadAdapter(
        self, request: adapter_service_pb2.UnloadAdapterRequest, context: Context
    ) -> adapter_service_pb2.UnloadAdapterResponse:
        await self._adapters.unload(request.model, request.name)
        return adapter_service_pb2.UnloadAdapterResponse()
