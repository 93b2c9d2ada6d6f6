"""How transformers are loaded from checkpoints of several layouts, on every rank what is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from services.denoiser.models.dit_layout import Layout
from services.modeling.layers import TensorModule
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh
from services.modeling.parallel.shards import Shares
from services.modeling.weights import Checkpoint, load_weights

Params = TypeVar("Params")


class DiT(TensorModule):
    """A transformer, or one rank's share of it.

    Args:
        shares: what the rank has.
    """

    shares: Shares


SomeDiT = TypeVar("SomeDiT", bound=DiT)


@dataclass(frozen=True)
class Architecture(Generic[Params, SomeDiT]):
    """What loading needs to know of a family.

    Args:
        find_layout: of a checkpoint, by its names.
        params_from_shapes: the dimensions, of a checkpoint without a config.
        params_from_config: those of diffusers' `transformer/config.json`.
        build: the network of these dimensions, shared over a mesh; on the meta device.
    """

    find_layout: Callable[[Checkpoint], Layout]
    params_from_shapes: Callable[[Checkpoint, Layout], Params]
    params_from_config: Callable[[Mapping[str, Any]], Params]
    build: Callable[[Params, ParallelMesh], SomeDiT]

    def load(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        float8: bool = False,
        mesh: ParallelMesh = ONE_RANK_MESH,
    ) -> SomeDiT:
        """The transformer that `checkpoint` holds, in the original layout or in diffusers'; its names tell.

        `config` is diffusers' `transformer/config.json`; without one the dimensions are read from the shapes.
        Raises CheckpointError when the names are of neither layout or don't fit the dimensions, or when the
        mesh can't share them.
        """
        layout = self.find_layout(checkpoint)
        params = self.params_from_shapes(checkpoint, layout) if config is None else self.params_from_config(config)
        with torch.device("meta"):
            dit = self.build(params, mesh)
        load_weights(
            dit,
            checkpoint,
            layout.sources(dit.state_dict().keys()),
            device=device,
            dtype=dtype,
            prefix=layout.prefix,
            float8=float8,
            shares=dit.shares,
        )
        dit.eval()
        return dit
