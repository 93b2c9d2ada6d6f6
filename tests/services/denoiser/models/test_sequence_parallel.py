"""Transformers whose tokens are shared by ranks equal the same ones on one rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.models.flux_dit import FluxDiT
from services.denoiser.models.flux_dit_params import FluxDiTParams
from services.denoiser.models.wan_dit import WanDiT
from services.denoiser.models.wan_dit_params import WanDiTParams
from services.modeling.layers import pack_weights
from services.modeling.lora.adapter import Adapter, Applied, Change, Match
from services.modeling.lora.branches import branches
from services.modeling.lora.deltas import LowRank
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.targets import Target
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh, mesh_of
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
TOLERANCE = 1e-5
TIMESTEPS = torch.tensor([750.0, 33.5])  # of two rows
HEADS, HEAD_WIDTH = 4, 16
TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH, IMAGE_TOKENS = 24, 20, 28, 5

FLUX = FluxDiTParams(
    in_channels=16,
    width=HEADS * HEAD_WIDTH,
    heads=HEADS,
    double_blocks=2,
    single_blocks=2,
    context_width=TEXT_WIDTH,
    pooled_width=POOLED_WIDTH,
    distilled_guidance=True,
    rope_channels=(4, 6, 6),
)
WAN_TEXT = WanDiTParams(
    in_channels=4,
    out_channels=4,
    width=HEADS * HEAD_WIDTH,
    heads=HEADS,
    mlp_width=96,
    blocks=2,
    text_width=TEXT_WIDTH,
    image_width=None,
    image_positions=None,
)
WAN_IMAGE = replace(WAN_TEXT, in_channels=12, image_width=IMAGE_WIDTH)

PLANS = {
    "ulysses 2": ParallelDegrees(cfg=2, ulysses=2),
    "ring 2": ParallelDegrees(cfg=2, ring=2),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses=2, ring=2),
    "ulysses 4": ParallelDegrees(ulysses=4),
}


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_weights(network: nn.Module) -> None:
    """The same random ones on every rank, in the form that the machine computes with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    pack_weights(network.requires_grad_(False))


def _adapters(network: nn.Module) -> AbstractContextManager[None]:
    """For the first row another change of every layer than for the second."""
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    rows = [(Applied(_adapter(layers, seed), 0.5),) for seed in (2, 3)]
    return branches(network, DENOISER, rows)


def _adapter(layers: dict[str, nn.Linear], seed: int) -> Adapter:
    changes = tuple(
        Change(
            Target(path, 0, layer.out_features),
            LowRank(0.2 * _random(3, layer.in_features, seed=seed), 0.2 * _random(layer.out_features, 3, seed=seed)),
        )
        for path, layer in layers.items()
    )
    return Adapter(f"of {seed}", "", str(seed), {DENOISER: changes}, Match("", len(changes), ()), 0)


def _no_adapters(network: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class FluxCase:
    """A pass through FLUX.1 for two rows: tokens of the text, height and width of the latent."""

    text_tokens: int
    size: tuple[int, int]
    adapters: Callable[[nn.Module], AbstractContextManager[None]] = _no_adapters

    def velocity(self, mesh: ParallelMesh) -> Tensor:
        dit = FluxDiT(FLUX, mesh)
        _with_weights(dit)
        text, pooled = _random(2, self.text_tokens, TEXT_WIDTH), _random(2, POOLED_WIDTH)
        with self.adapters(dit):
            context = dit.prepare(text, pooled, torch.tensor([3.5, 2.0]), self.size)
            return dit(_random(2, 4, *self.size), TIMESTEPS, context)


@dataclass(frozen=True, kw_only=True)
class WanCase:
    """A pass through Wan for two rows: frames, height and width of the latent."""

    size: tuple[int, int, int]
    params: WanDiTParams = WAN_TEXT
    timesteps: Tensor = TIMESTEPS
    adapters: Callable[[nn.Module], AbstractContextManager[None]] = _no_adapters

    def velocity(self, mesh: ParallelMesh) -> Tensor:
        dit = WanDiT(self.params, mesh)
        _with_weights(dit)
        takes_picture = self.params.image_width is not None
        image = _random(2, IMAGE_TOKENS, IMAGE_WIDTH) if takes_picture else None
        image_latents = _random(2, 8, *self.size) if takes_picture else None
        with self.adapters(dit):
            context = dit.prepare(_random(2, 6, TEXT_WIDTH), image, image_latents, self.size)
            return dit(_random(2, 4, *self.size), self.timesteps, context)


CASES: dict[str, FluxCase | WanCase] = {
    "flux, even": FluxCase(text_tokens=8, size=(8, 16)),
    "flux, uneven": FluxCase(text_tokens=7, size=(6, 10)),
    "flux, fewer tokens than ranks": FluxCase(text_tokens=1, size=(2, 4)),
    "flux, adapters": FluxCase(text_tokens=7, size=(6, 10), adapters=_adapters),
    "wan text to video, even": WanCase(size=(2, 4, 8)),
    "wan text to video, uneven": WanCase(size=(3, 6, 10)),
    "wan text to video, fewer tokens than ranks": WanCase(size=(1, 2, 4)),
    "wan text to video, timesteps by token": WanCase(size=(3, 6, 10), timesteps=torch.linspace(0, 999, 90).view(2, 45)),
    "wan text to video, adapters": WanCase(size=(3, 6, 10), adapters=_adapters),
    "wan image to video, even": WanCase(size=(2, 4, 8), params=WAN_IMAGE),
    "wan image to video, uneven": WanCase(size=(3, 6, 10), params=WAN_IMAGE),
}


def _errors(_: ParallelMesh) -> dict[tuple[str, str], float]:
    """The largest difference to one rank, relative to the largest velocity, of each plan and case."""
    meshes = {plan: mesh_of(degrees, CPU) for plan, degrees in PLANS.items()}
    errors = {}
    with torch.inference_mode():
        for name, case in CASES.items():
            expected = case.velocity(ONE_RANK_MESH)
            for plan, mesh in meshes.items():
                errors[plan, name] = float((case.velocity(mesh) - expected).abs().max() / expected.abs().max())
    return errors


@cache
def _of_all_ranks() -> list[dict[tuple[str, str], float]]:
    """One group of four processes for all cases."""
    return on_ranks(ParallelDegrees(ulysses=4), _errors)


@pytest.mark.parametrize("case", list(product(PLANS, CASES)), ids=": ".join)
def test_every_plan_equals_one_rank_on_every_rank(case: tuple[str, str]) -> None:
    assert max(errors[case] for errors in _of_all_ranks()) < TOLERANCE
