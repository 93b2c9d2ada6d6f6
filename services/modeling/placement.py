"""Where a network's weights are kept, in which form, and when they come to the device that computes with them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from safelight.errors import CheckpointError
from services.common.manifest import CPU_OFFLOAD, FLOAT8, SEQUENTIAL, Part
from services.modeling.components import resolve_dtype
from services.modeling.float8 import store_as_float8
from services.modeling.layers import pack_weights
from services.modeling.parallel.fsdp import gathered_weights
from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.shards import WHOLE, Shares
from services.modeling.residency import RESIDENT, Residency
from services.modeling.weight_streaming import OffloadedWeights, WeightAccount, WeightBlock
from services.modeling.weight_transfer import transfer_to

Network = TypeVar("Network", bound=nn.Module)

_log = logging.getLogger("safelight.placement")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one network is placed.

    Args:
        device: computes.
        dtype: of the computation.
        float8: store the large matrices in float8.
        residency: how much of the weights the device holds, and until when.
    """

    device: torch.device
    dtype: torch.dtype
    float8: bool = False
    residency: Residency = RESIDENT

    @property
    def loading_device(self) -> torch.device:
        """Where weights are loaded before they are placed: as a whole they may be too large for the device."""
        return torch.device("cpu") if self.float8 or self.offloads else self.device

    @property
    def offloads(self) -> bool:
        """Whether not all weights are always on the device."""
        return self.device.type != "cpu" and self.residency != RESIDENT


class PlacedWeights(Protocol):
    """The weights of a network, wherever they are."""

    account: WeightAccount

    def leave(self) -> None:
        """The network has no work: give the device back, if that is wanted."""
        ...

    def at_home(self) -> AbstractContextManager[None]:
        """Keeps every weight where it stays meanwhile: what is changed there now lasts."""
        ...


class ResidentWeights:
    """Weights that are on the device, always."""

    def __init__(self, network: nn.Module) -> None:
        self.account = WeightAccount(sum(parameter.nbytes for parameter in network.parameters()))

    def leave(self) -> None:
        """They stay."""

    def at_home(self) -> AbstractContextManager[None]:
        """They are."""
        return nullcontext()


def placement_of(part: Part, device: torch.device, half: torch.dtype = torch.float16) -> Placement:
    """What the manifest asks for a network, of a family with this half precision (`resolve_dtype`).

    Where a CPU computes, nothing is offloaded: the weights are there. A budget says there how much memory their packed
    forms may take.
    """
    residency = _residency(part)
    if device.type == "cpu" and residency.leaves_when_idle:
        _log.warning("on a CPU there is nothing to offload weights from: they stay")
        residency = Residency(budget_bytes=part.memory_budget)
    dtype = resolve_dtype(part.dtype, device, half)
    return Placement(device=device, dtype=dtype, float8=part.dtype == FLOAT8, residency=residency)


@dataclass(frozen=True)
class Placed(Generic[Network]):
    """A network that is ready to compute. `shares`: what this rank has of it."""

    network: Network
    placement: Placement
    weights: PlacedWeights
    shares: Shares = WHOLE


def place(
    network: Network,
    placement: Placement,
    blocks: Sequence[WeightBlock],
    full_precision: Sequence[nn.Module] = (),
    shares: Shares = WHOLE,
) -> Placed[Network]:
    """Bring a loaded network's weights to where and into the form in which they are kept.

    Args:
        network: loaded onto `placement.loading_device`.
        placement: where, and how.
        blocks: all of the network, in the order in which it computes.
        full_precision: modules that are never stored in eight bits beside norms, biases and embeddings: modulation.
        shares: what this rank has of it.

    Raises:
        CheckpointError: there is a budget, and ranks keep parts of the blocks (FSDP).
        ValueError: a parameter is in no block.
    """
    _check_complete(network, blocks)
    if placement.float8:
        store_as_float8(network, placement.dtype, full_precision)
    _move_buffers(network, placement.device)
    return Placed(network, placement, _placed_weights(network, placement, blocks, shares), shares)


def _placed_weights(
    network: nn.Module, placement: Placement, blocks: Sequence[WeightBlock], shares: Shares
) -> PlacedWeights:
    if shares.gathered:
        return _gathered(network, placement, blocks, shares.shards, shares.gathered)
    if placement.offloads:
        return OffloadedWeights(blocks, placement.residency, transfer_to(placement.device))
    network.to(placement.device)
    weights = ResidentWeights(network)
    pack_weights(network, placement.residency.budget_bytes)
    return weights


def _gathered(
    network: nn.Module, placement: Placement, blocks: Sequence[WeightBlock], names: Collection[str], axis: Axis
) -> OffloadedWeights:
    if placement.offloads and placement.residency.budget_bytes:
        raise CheckpointError(
            "weights of which each rank keeps a part ('fsdp') take that part and two blocks of memory, and no other "
            "'memory_budget': leave it out, or offload the parts too ('offload: cpu_offload')"
        )
    transfer = transfer_to(placement.device)
    return gathered_weights(network, names, axis, blocks, transfer, offloads=placement.offloads)


def _residency(part: Part) -> Residency:
    if part.offload == SEQUENTIAL:
        return Residency(budget_bytes=0, leaves_when_idle=True)
    return Residency(budget_bytes=part.memory_budget, leaves_when_idle=part.offload == CPU_OFFLOAD)


def _check_complete(network: nn.Module, blocks: Sequence[WeightBlock]) -> None:
    covered = {parameter for block in blocks for module in block.modules for parameter in module.parameters()}
    if left := [name for name, parameter in network.named_parameters() if parameter not in covered]:
        raise ValueError(f"{type(network).__name__}: {left[0]} and {len(left) - 1} more are in no block")


def _move_buffers(network: nn.Module, device: torch.device) -> None:
    """Buffers are small, and always on the device."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
