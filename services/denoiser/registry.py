"""Which denoiser serves which model family. A new family is a file in models/ and a line here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.v1.model_pb2 import ModelDescription
from services.common.manifest import ModelEntry
from services.common.parallel_degrees import ParallelDegrees, over_guidance_and_tokens, over_rows, over_tokens
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.models.flux import FluxDenoiser
from services.denoiser.models.sd15 import load_sd15
from services.denoiser.models.sdxl import load_sdxl
from services.denoiser.models.wan import WanDenoiser
from services.denoiser.previews import LatentPreviewMap
from services.denoiser.sampling.model_sampling import ModelSampling
from services.modeling.loading import Loader
from services.modeling.lora.network import AdaptableNetwork, RowAdapters
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh
from services.modeling.placement import PlacedWeights


class AdaptedNetwork(Protocol):
    """Applies adapters, for one forward pass each time."""

    def with_branches(self, rows: RowAdapters) -> AbstractContextManager[None]:
        """Within it, each row of a forward pass has its adapters applied, beside the layers."""
        ...

    def with_adapters(self, rows: RowAdapters, max_fused_bytes: int) -> AbstractContextManager[None]:
        """The same; a set that is used much may be applied within the weights, of which a copy takes so many bytes."""
        ...


class Denoiser(Protocol):
    """What the engine needs of a model family; `prepare`'s result is the family's own and goes back into `predict`.

    device: where states are computed.
    row_groups: so many parts of a batch are computed apart, each by devices of its own.
    """

    sampling: ModelSampling
    fingerprint: str
    device: torch.device
    weights: Sequence[PlacedWeights]
    preview_map: LatentPreviewMap | None
    row_groups: int

    @property
    def network(self) -> AdaptedNetwork:
        """What adapters are applied to."""
        ...

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        ...

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """Conditioning of the usual size, to measure with."""
        ...

    def prepare(self, conditioning: PromptConditioning) -> Any:
        """Whatever depends on the conditioning alone, computed once a request."""
        ...

    def batch_key(self, prepared: Any) -> Hashable:
        """Prepared conditioning of equal key can share a forward pass."""
        ...

    def move(self, prepared: Any, device: torch.device) -> Any:
        """Prepared conditioning on another device."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Any]) -> Tensor:
        """What the network predicts (epsilon, v, velocity) for each row of a batch, from the process's model input."""
        ...


class LocalDenoiser(Denoiser, Protocol):
    """A denoiser whose network, or this rank's part of it, is in this process."""

    network: AdaptableNetwork


class DenoiserLoader(Protocol):
    """Reads a manifest entry's network onto a device; the ranks of a mesh share it."""

    def __call__(self, entry: ModelEntry, device: torch.device, mesh: ParallelMesh = ONE_RANK_MESH) -> LocalDenoiser:
        """Raises CheckpointError: it can't be read, or a family's network can't be shared as the mesh does."""
        ...


LOADERS: dict[str, DenoiserLoader] = {
    "sd15": load_sd15,
    "sdxl": load_sdxl,
    "flux": FluxDenoiser.load,
    "wan": WanDenoiser.load,
}

USUAL_DEGREES: dict[str, Callable[[int], ParallelDegrees]] = {
    "sd15": over_rows,
    "sdxl": over_rows,
    "flux": over_tokens,
    "wan": over_guidance_and_tokens,
}
"""How a family is shared over so many devices when the manifest does not say."""


def loaders_over(mesh: ParallelMesh) -> dict[str, Loader[LocalDenoiser]]:
    """The loaders, of networks that the ranks of a mesh share."""
    return {family: partial(load, mesh=mesh) for family, load in LOADERS.items()}
