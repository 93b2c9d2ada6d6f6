"""Laws of the engine that no server is needed for: how many passes a step takes, and where its tensors lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.common.manifest import load_manifest
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob
from services.denoiser.registry import LOADERS, Denoiser
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.state import SamplerState, state_on
from services.modeling.loading import load_models

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def model(tiny_manifest: str) -> Denoiser:
    return load_models(load_manifest(tiny_manifest), LOADERS, torch.device("cpu"))["tiny"]


class Counting:
    """The model, with a count of the rows of each forward pass."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: list[Tensor]) -> Tensor:
        self.passes.append(len(rows))
        return self._model.predict(latents, timesteps, rows)


def job(engine: DenoiserEngine, *, guided: bool, exact: bool = False) -> DenoiseJob:
    model = engine.models["tiny"]
    plan = plan_sampling(model.sampling, latent_shape=SHAPE, sampler="dpmpp_2m", schedule="karras", steps=4)
    noise = NoiseSource(1, (1, *SHAPE))
    prepared = engine.prepare("tiny", PromptConditioning(model.example_conditioning(), "conditioning", (4, 8, 8)))
    return DenoiseJob(
        model="tiny",
        plan=plan,
        noise=noise,
        state=engine.start("tiny", plan, noise),
        guidance_scale=3.0,
        positive=prepared,
        negative=prepared if guided else None,
        exact=exact,
    )


@pytest.mark.parametrize(("batch_cfg", "passes"), [(True, [5]), (False, [3, 2])])
def test_rows_for_guidance_are_added_only_where_needed(model: Denoiser, batch_cfg: bool, passes: list[int]) -> None:
    counting = Counting(model)
    engine = DenoiserEngine({"tiny": counting}, batch_cfg)  # type: ignore[dict-item]  # it stands in for the model
    engine.step([job(engine, guided=True), job(engine, guided=False), job(engine, guided=True)])
    assert counting.passes == passes


@pytest.mark.parametrize("batch_cfg", [True, False])
def test_every_row_of_an_exact_request_has_a_pass_of_its_own(model: Denoiser, batch_cfg: bool) -> None:
    counting = Counting(model)
    engine = DenoiserEngine({"tiny": counting}, batch_cfg)  # type: ignore[dict-item]  # it stands in for the model
    engine.step([job(engine, guided=True, exact=True)])
    assert counting.passes == [1, 1]


def test_exact_requests_share_no_key_with_others(model: Denoiser) -> None:
    engine = DenoiserEngine({"tiny": model}, batch_cfg=True)
    keys = {
        engine.batch_key(job(engine, guided=guided, exact=exact)) for guided in (False, True) for exact in (False, True)
    }
    assert len(keys) == 2


def test_what_a_request_holds_moves_as_a_whole() -> None:
    state = SamplerState(torch.zeros(1, *SHAPE), 2, (torch.zeros(1, *SHAPE),), 1)
    moved = state_on(state, torch.device("meta"))
    assert {moved.latents.device.type, *(each.device.type for each in moved.history)} == {"meta"}
    assert (moved.step_index, moved.noise_draws) == (2, 1)


def test_on_a_cpu_nothing_has_to_move_when_a_request_yields(model: Denoiser) -> None:
    engine = DenoiserEngine({"tiny": model}, batch_cfg=True)
    yielded = job(engine, guided=True)
    before = yielded.state
    assert engine.spill([yielded]) == 0
    assert yielded.state is before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_request_that_yielded_on_a_gpu_goes_on_with_the_same_bits(tiny_manifest: str) -> None:
    engine = DenoiserEngine(load_models(load_manifest(tiny_manifest), LOADERS, torch.device("cuda")), batch_cfg=True)
    yielding, staying = (job(engine, guided=True, exact=True) for _ in range(2))
    for _ in range(4):
        engine.step([staying])
        engine.step([yielding])
        assert engine.spill([yielding]) == 1
        assert yielding.state.latents.device.type == yielding.positive.device.type == "cpu"
    assert torch.equal(yielding.state.latents, staying.state.latents.cpu())
