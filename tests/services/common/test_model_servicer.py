"""Laws of ModelService: models sorted by name, and a name that is not served is an error that lists those that are."""

from __future__ import annotations

import pytest

from safelight.errors import UnknownModelError
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from safelight.v1.model_service_pb2_grpc import ModelServiceStub
from services.common.exchange import TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve, failure

MODELS = [ModelDescription(name="majicflus", family="sd15"), ModelDescription(name="demo", family="sd15")]


@pytest.fixture
async def models(serve: Serve) -> ModelServiceStub:
    running = await serve(Service("encoder", stage_mounts(TensorStore(60.0, Metrics()), MODELS, GetLoadResponse)))
    return ModelServiceStub(running.channel)


async def test_models_are_sorted_by_name(models: ModelServiceStub) -> None:
    response = await models.ListModels(ListModelsRequest())
    assert [model.name for model in response.models] == ["demo", "majicflus"]


async def test_a_model_is_found_by_its_name(models: ModelServiceStub) -> None:
    assert (await models.GetModel(GetModelRequest(name="majicflus"))).model == MODELS[0]


async def test_an_unknown_model_is_an_error_that_lists_those_there_are(models: ModelServiceStub) -> None:
    error = await failure(models.GetModel(GetModelRequest(name="sdxl")))
    assert type(error) is UnknownModelError
    assert str(error) == "model 'sdxl' is not served here; there are: majicflus, demo"
    assert error.metadata == {"model": "sdxl"}
