"""ModelService, the same in every stage and in the gateway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safelight.errors import UnknownModelError
from safelight.v1 import model_service_pb2 as pb
from safelight.v1 import model_service_pb2_grpc as pb_grpc
from safelight.v1.model_pb2 import ModelDescription
from services.common.request_context import Context


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Answers with what `list_models` gives at the moment."""

    def __init__(self, list_models: Callable[[], Sequence[ModelDescription]]) -> None:
        self._list_models = list_models

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=sorted(self._list_models(), key=lambda model: model.name))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        models = {model.name: model for model in self._list_models()}
        return pb.GetModelResponse(model=find_model(models, request.name))


def find_model(models: dict[str, ModelDescription], name: str) -> ModelDescription:
    """The model of that name.

    Raises:
        UnknownModelError: there is none; the message lists those there are.
    """
    if name not in models:
        raise UnknownModelError(
            f"model {name!r} is not served here; there are: {', '.join(models) or 'none'}", model=name
        )
    return models[name]
