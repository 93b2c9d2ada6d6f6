"""FLUX.1 as the engine sees it: what it says of itself, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.errors import CheckpointError, InvalidRequestError
from safelight.v1 import denoiser_service_pb2 as pb
from safelight.v1.work_pb2 import GuidanceOptions
from services.common.manifest import ModelEntry
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.models.flux import FluxDenoiser
from services.denoiser.validation import check_denoise
from services.modeling.parallel.mesh import Axis, ParallelMesh
from tests.support.stage_requests import conditioning
from tests.support.tiny_flux import CONTEXT_WIDTH, POOLED_WIDTH

SHAPE = (16, 4, 6)


@pytest.fixture(scope="module")
def dev(tiny_flux: Path) -> FluxDenoiser:
    entry = ModelEntry(name="dev", path=str(tiny_flux), defaults={"distilled_scale": 2.0})
    return FluxDenoiser.load(entry, torch.device("cpu"))


def prompt(scale: float | None = None, **tensors: Any) -> PromptConditioning:
    usual = {
        "prompt_embeds": torch.ones(1, 7, CONTEXT_WIDTH),
        "pooled_prompt_embeds": torch.ones(1, POOLED_WIDTH),
    }
    return PromptConditioning({**usual, **tensors}, "conditioning", SHAPE, scale)


def test_the_manifest_s_defaults_go_over_the_family_s(dev: FluxDenoiser) -> None:
    described = dev.describe("dev").denoiser
    assert (described.default_steps, described.default_guidance_scale, described.default_distilled_scale) == (30, 1, 2)
    assert list(described.conditioning) == list(dev.example_conditioning())


@torch.inference_mode()
def test_a_request_without_a_distilled_scale_has_the_default_one(dev: FluxDenoiser) -> None:
    usual, same, other = (dev.prepare(prompt(scale)).vector for scale in (None, 2.0, 5.0))
    assert torch.equal(usual, same)
    assert not torch.equal(usual, other)


@torch.inference_mode()
def test_rotations_are_computed_once_a_request_for_text_and_picture(dev: FluxDenoiser) -> None:
    prepared = dev.prepare(prompt())
    assert prepared.rope.shape == (7 + 2 * 3, 16)
    assert torch.equal(prepared.rope[:7], torch.ones(7, 16, dtype=torch.complex64))
    assert dev.batch_key(prepared) == 7
    assert torch.equal(dev.move(prepared, torch.device("cpu")).rope, prepared.rope)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("prompt_embeds", torch.ones(1, 7, CONTEXT_WIDTH + 1)),
        ("prompt_embeds", torch.ones(7, CONTEXT_WIDTH)),
        ("pooled_prompt_embeds", torch.ones(1, 1, POOLED_WIDTH)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(dev: FluxDenoiser, name: str, tensor: Tensor) -> None:
    with pytest.raises(InvalidRequestError, match=rf"conditioning\.{name}: must be a tensor of shape \[1, "):
        dev.prepare(prompt(None, **{name: tensor}))


@pytest.mark.parametrize(
    ("shape", "guidance", "field"),
    [
        ([16, 4, 5], GuidanceOptions(), "latent_shape"),
        ([4, 4, 6], GuidanceOptions(), "latent_shape"),
        (list(SHAPE), GuidanceOptions(distilled_scale=101), "guidance.distilled_scale"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_field(
    dev: FluxDenoiser, shape: list[int], guidance: GuidanceOptions, field: str
) -> None:
    described = dev.describe("dev").denoiser
    described.max_latent_area, described.max_steps = 4096, 100
    request = pb.DenoiseRequest(model="dev", conditioning=conditioning(0), latent_shape=shape, guidance=guidance)
    with pytest.raises(InvalidRequestError) as caught:
        check_denoise(request, described)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_model_without_distilled_guidance_refuses_a_scale(dev: FluxDenoiser) -> None:
    described = dev.describe("schnell").denoiser
    described.ClearField("default_distilled_scale")
    described.max_latent_area, described.max_steps = 4096, 100
    request = pb.DenoiseRequest(
        model="schnell", conditioning=conditioning(0), latent_shape=SHAPE, guidance=GuidanceOptions(distilled_scale=3)
    )
    with pytest.raises(InvalidRequestError, match="'schnell' takes none; leave it out"):
        check_denoise(request, described)


def test_ranks_that_cannot_share_the_heads_are_refused_at_load(tiny_flux: Path) -> None:
    entry, mesh = ModelEntry(name="dev", path=str(tiny_flux)), ParallelMesh(ulysses=Axis(0, 4))
    with pytest.raises(CheckpointError, match="2 attention heads can't be shared evenly by 4 ranks"):
        FluxDenoiser.load(entry, torch.device("cpu"), mesh)
