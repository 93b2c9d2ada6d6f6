"""AdapterService of a stage: unpack, call, pack."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from safelight.v1 import adapter_service_pb2 as pb
from safelight.v1 import adapter_service_pb2_grpc as pb_grpc
from services.common.request_context import Context
from services.modeling.lora.library import AdapterLibrary


class AdapterServicer(pb_grpc.AdapterServiceServicer):
    """What one replica has loaded."""

    def __init__(self, library: AdapterLibrary) -> None:
        self._library = library

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        return pb.LoadAdapterResponse(adapter=await self._library.load(request))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=self._library.listing(request.model))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        await self._library.unload(request.model, request.name)
        return pb.UnloadAdapterResponse()


def adapter_mount(library: AdapterLibrary) -> Callable[[grpc.aio.Server], None]:
    """Mounts the service on a server."""
    servicer = AdapterServicer(library)
    return lambda server: pb_grpc.add_AdapterServiceServicer_to_server(servicer, server)
