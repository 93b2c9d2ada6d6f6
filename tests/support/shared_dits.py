"""Transformers that the ranks of a mesh share, computed on each of them; what ranks import knows no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.models import flux_dit, wan_dit
from services.modeling.lora.adapter import Applied
from services.modeling.lora.fusing import WORTHWHILE_PASSES
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.reading import read_adapter
from services.modeling.parallel.mesh import ParallelMesh, mesh_of
from services.modeling.placement import Placed, Placement, place
from services.modeling.weights import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
ROWS, TEXT_TOKENS, IMAGE_TOKENS = 2, 7, 5
TIMESTEPS, SCALES = torch.tensor([750.0, 33.5]), torch.tensor([3.5, 2.0])


@dataclass(frozen=True)
class Family:
    """How a family's transformer is loaded and computed."""

    load: Callable[..., Any]
    adaptable: Callable[[Placed[Any], Checkpoint], AdaptableNetwork]
    predict: Callable[[Any, torch.dtype], Tensor]


def _random(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _predict_flux(dit: flux_dit.FluxDiT, dtype: torch.dtype) -> Tensor:
    params, size, random = dit.params, (8, 6), partial(_random, dtype)
    embeds, pooled = random(TEXT_TOKENS, params.context_width, seed=2), random(params.pooled_width, seed=3)
    context = dit.prepare(embeds, pooled, SCALES, size)
    return dit(random(params.in_channels // flux_dit.PATCH**2, *size, seed=1), TIMESTEPS, context)


def _predict_wan(dit: wan_dit.WanDiT, dtype: torch.dtype) -> Tensor:
    params, size, random = dit.params, (2, 6, 4), partial(_random, dtype)
    image = None if params.image_width is None else random(IMAGE_TOKENS, params.image_width, seed=3)
    given = params.in_channels - params.out_channels
    context = dit.prepare(
        random(TEXT_TOKENS, params.text_width, seed=2), image, random(given, *size, seed=4) if given else None, size
    )
    return dit(random(params.out_channels, *size, seed=1), TIMESTEPS, context)


FAMILIES = {
    "flux": Family(flux_dit.load_flux_dit, flux_dit.flux_adaptable_network, _predict_flux),
    "wan": Family(wan_dit.load_wan_dit, wan_dit.wan_adaptable_network, _predict_wan),
}


@dataclass(frozen=True)
class Case:
    """A transformer's weights, and what is done with them.

    Args:
        family: of FAMILIES.
        path: of the checkpoint.
        config: diffusers'; None: dimensions are told by the shapes.
        dtype: of the computation.
        float8: whether large matrices are stored in eight bits.
        lora: of the first row; None: of none.
        fused: all rows have the LoRA, within the weights.
    """

    family: str
    path: Path
    config: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    float8: bool = False
    lora: Path | None = None
    fused: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one rank made of a case, and the bytes of weights that it holds."""

    velocity: Tensor
    resident_bytes: int
    peak_bytes: int
    block_bytes: tuple[int, ...]
    matched: int


def load(mesh: ParallelMesh, case: Case) -> tuple[Placed[Any], AdaptableNetwork]:
    """The network of a case as a rank has it."""
    family, checkpoint = FAMILIES[case.family], open_checkpoint(case.path)
    placement = Placement(device=CPU, dtype=case.dtype, float8=case.float8)
    dit = family.load(checkpoint, case.config, device=CPU, dtype=case.dtype, float8=case.float8, mesh=mesh)
    placed = place(dit, placement, dit.weight_blocks(), dit.full_precision(), dit.shares)
    return placed, family.adaptable(placed, checkpoint)


@torch.inference_mode()
def compute(mesh: ParallelMesh, case: Case) -> Outcome:
    """One forward pass of a case."""
    placed, network = load(mesh, case)
    rows: Sequence[tuple[Applied, ...]] = [(), ()]
    matched = 0
    if case.lora is not None:
        adapter = read_adapter("lora", str(case.lora), [network], [DENOISER])
        matched, applied = adapter.match.matched, (Applied(adapter, 0.5),)
        rows = [applied, applied if case.fused else ()]
    for _ in range(case.fused * WORTHWHILE_PASSES):
        network.with_adapters(rows, 2**30)
    with network.with_adapters(rows, 2**30):
        velocity = FAMILIES[case.family].predict(placed.network, case.dtype)
    account = placed.weights.account
    return Outcome(velocity, account.resident_bytes, account.peak_bytes, _block_bytes(placed.network), matched)


def compute_all(mesh: ParallelMesh, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """Every case, one after the other."""
    return {name: compute(mesh, case) for name, case in cases.items()}


def compute_all_by(
    mesh: ParallelMesh, work: Sequence[tuple[ParallelDegrees, Mapping[str, Case]]]
) -> list[dict[str, Outcome]]:
    """Cases by each of several ways in which the group may be ordered."""
    return [compute_all(mesh_of(degrees, CPU), cases) for degrees, cases in work]


def _block_bytes(dit: Any) -> tuple[int, ...]:
    return tuple(
        sum(parameter.nbytes for module in block.modules for parameter in module.parameters())
        for block in dit.weight_blocks()
    )
