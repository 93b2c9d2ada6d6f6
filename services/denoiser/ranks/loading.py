"""Loads each model here, or on a group of ranks if the manifest asks for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from safelight.errors import CheckpointError
from services.common.availability import Availability
from services.common.manifest import ModelEntry
from services.common.metrics import Metrics
from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.ranks.denoiser import RankedDenoiser
from services.denoiser.ranks.entrance import Entrance
from services.denoiser.ranks.group import GroupPlan, RankGroup
from services.denoiser.registry import LOADERS, USUAL_DEGREES, Denoiser
from services.denoiser.settings import DenoiserSettings
from services.modeling.loading import Loader
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.library import AdapterNetworks
from services.modeling.lora.reading import StageNetworks


@dataclass
class RankLoading:
    """Loads the models of a denoiser, and ends the groups that it has started.

    Args:
        settings: of the denoiser.
        metrics: see `RankGroup`.
        availability: see `RankGroup`.
        networks: for which adapters are read, of each model that is loaded.
    """

    settings: DenoiserSettings
    metrics: Metrics
    availability: Availability
    networks: dict[str, AdapterNetworks] = field(default_factory=dict)
    _groups: list[RankGroup] = field(default_factory=list)

    def loaders(self) -> Mapping[str, Loader[Denoiser]]:
        """By family."""
        return {family: partial(self._load, family) for family in LOADERS}

    def close(self) -> None:
        """End all ranks."""
        for group in self._groups:
            group.close()

    def _load(self, family: str, entry: ModelEntry, device: torch.device) -> Denoiser:
        degrees = entry.denoiser.parallel or USUAL_DEGREES[family](entry.denoiser.parallelism)
        if degrees.ranks == 1:
            model = LOADERS[family](entry, device)
            self.networks[entry.name] = StageNetworks([model.network], (DENOISER,))
            return model
        group = RankGroup(self._plan(entry, degrees, device), self.metrics, self.availability)
        self._groups.append(group)
        ranked = RankedDenoiser(group, degrees.cfg)
        self.networks[entry.name] = ranked.network
        return ranked

    def _plan(self, entry: ModelEntry, degrees: ParallelDegrees, device: torch.device) -> GroupPlan:
        settings = self.settings
        here = _ranks_here(entry, degrees.ranks, settings.nodes)
        threads = settings.threads or torch.get_num_threads()
        return GroupPlan(
            entry=entry,
            degrees=degrees,
            devices=_devices(entry, here, device) + _usual_devices(here, device.type) * (settings.nodes - 1),
            here=here,
            entrance=self._entrance(entry),
            threads=max(threads // here, 1),
            log_level=settings.log_level,
            answer_seconds=settings.rank_answer_seconds,
        )

    def _entrance(self, entry: ModelEntry) -> Entrance | None:
        settings = self.settings
        if settings.nodes == 1:
            return None
        if self._groups:
            raise CheckpointError(
                f"model {entry.name!r}: of the models of a denoiser with nodes={settings.nodes}, only one can be on "
                "several devices: serve the others by another denoiser"
            )
        return Entrance((settings.master_address, settings.master_port), settings.rank_secret)


def _ranks_here(entry: ModelEntry, ranks: int, nodes: int) -> int:
    """Of this machine, and of each of the others."""
    if ranks % nodes:
        raise CheckpointError(
            f"model {entry.name!r}: its {ranks} ranks can't be dealt evenly to {nodes} machines: change nodes, or "
            "denoiser.parallel in the manifest"
        )
    return ranks // nodes


def _usual_devices(ranks: int, kind: str) -> list[str]:
    """Of a machine beside this one: all its GPUs from the first."""
    return [kind if kind == "cpu" else f"{kind}:{rank}" for rank in range(ranks)]


def _devices(entry: ModelEntry, ranks: int, device: torch.device) -> list[str]:
    """A device for each rank: the GPUs that follow the one that is named, or the CPU for all.

    Raises:
        CheckpointError: the machine has too few.
    """
    if device.type == "cpu":
        return ["cpu"] * ranks
    first, there = device.index or 0, torch.cuda.device_count()
    if first + ranks > there:
        raise CheckpointError(
            f"model {entry.name!r}: its {ranks} ranks need the GPUs {first} to {first + ranks - 1}; this machine has "
            f"{there}: lower denoiser.parallelism or denoiser.parallel in the manifest"
        )
    return [f"{device.type}:{first + rank}" for rank in range(ranks)]
