"""LoadService, the same in every stage: how busy it is at the moment."""

from __future__ import annotations

from collections.abc import Callable

from safelight.v1 import load_service_pb2 as pb
from safelight.v1 import load_service_pb2_grpc as pb_grpc
from services.common.request_context import Context


class LoadServicer(pb_grpc.LoadServiceServicer):
    """Answers with what `load` gives at the moment."""

    def __init__(self, load: Callable[[], pb.GetLoadResponse]) -> None:
        self._load = load

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        return self._load()
