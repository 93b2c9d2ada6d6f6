"""A denoiser whose network is on the ranks of a group: prepares and predicts there, and holds nothing but numbers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from safelight.v1.model_pb2 import ModelDescription
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.ranks.commands import Predict, Prepare
from services.denoiser.ranks.group import RankGroup, restarting_error
from services.denoiser.ranks.network import RankedNetwork
from services.denoiser.ranks.ranks import PreparedOnRanks
from services.denoiser.ranks.weights import RankedWeights
from services.modeling.placement import PlacedWeights


class RankedDenoiser:
    """Satisfies `Denoiser`; states and samplers are on the CPU of this process, which is no rank.

    Args:
        group: has the network.
        row_groups: see `Denoiser`.
    """

    device = torch.device("cpu")

    def __init__(self, group: RankGroup, row_groups: int) -> None:
        self._group = group
        self._numbers = count()
        self.row_groups = row_groups
        self.network = RankedNetwork(group)
        self.weights: Sequence[PlacedWeights] = (RankedWeights(group),)
        loaded = group.loaded
        self.sampling, self.fingerprint, self.preview_map = loaded.sampling, loaded.fingerprint, loaded.preview_map

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        description = ModelDescription.FromString(self._group.loaded.description)
        description.name = name
        return description

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """Conditioning of the usual size."""
        return self._group.loaded.example_conditioning

    def prepare(self, conditioning: PromptConditioning) -> PreparedOnRanks:
        """The conditioning, prepared on every rank.

        Raises:
            InvalidRequestError: a tensor is missing or of the wrong shape.
            ModelRestartingError: a rank is lost.
        """
        prepared = PreparedOnRanks(self._group.ranks, next(self._numbers))
        prepared.ranks.prepared.add(prepared)
        rows = self.network.rows or ((),)
        prepared.batch_key = self._group.call(Prepare(prepared.number, conditioning, rows[0]))[0]
        return prepared

    def batch_key(self, prepared: PreparedOnRanks) -> Hashable:
        """What the family says."""
        return prepared.batch_key

    def move(self, prepared: PreparedOnRanks, device: torch.device) -> PreparedOnRanks:
        """It is where it is."""
        return prepared

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[PreparedOnRanks]) -> Tensor:
        """What the network predicts for each row, from the ranks that computed it.

        Raises:
            ModelRestartingError: a rank is lost, or those are that had prepared a row.
        """
        if any(row.ranks is not self._group.ranks for row in rows):
            raise restarting_error(self._group.name, "the ranks that had prepared the request are lost")
        numbers = tuple(row.number for row in rows)
        adapters = self.network.rows or ((),) * len(rows)
        command = Predict(latents, timesteps, numbers, adapters, self.network.max_fused_bytes)
        return torch.cat([answer for answer in self._group.call(command) if answer is not None])
