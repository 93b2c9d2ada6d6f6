"""A network that adapters can be applied to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from services.modeling.layers import dense_weight
from services.modeling.lora.adapter import Adapter, Applied, Change, set_key
from services.modeling.lora.branches import branches
from services.modeling.lora.deltas import Delta
from services.modeling.lora.fusing import FusedSet, FusionPolicy, fuse, fused_bytes
from services.modeling.lora.targets import Naming, Target, find_targets, weight_shape
from services.modeling.placement import Placed
from services.modeling.weights import WholeWeights

RowAdapters = Sequence[tuple[Applied, ...]]
"""What each row of a batch applies."""


class AdaptableNetwork:
    """A network, and how LoRAs name its layers.

    Args:
        components: that it is of the model: layouts.DENOISER, or those of layouts.TEXT_ENCODERS that LoRAs call it.
        placed: the network; the first dimension of what its layers take is that of the batch.
        namings: the names of its layers in the checkpoints that LoRAs are trained on.
        whole: its weights where they were loaded from; needed if this rank has shards of them.
    """

    def __init__(
        self,
        components: Sequence[str],
        placed: Placed[Any],
        namings: Sequence[Naming],
        whole: WholeWeights | None = None,
    ) -> None:
        self.components = components
        self.module: nn.Module = placed.network
        self.targets = find_targets(self.module, namings)
        self._layers = {
            target.layer: self.module.get_submodule(target.layer)
            for targets in self.targets.values()
            for target in targets
        }
        self.device, self.dtype = placed.placement.device, placed.placement.dtype
        self._weights, self._shares, self._whole = placed.weights, placed.shares, whole
        streams = placed.placement.offloads or placed.shares.gathered is not None
        self._can_fuse = not (streams or placed.placement.float8)
        self._policy = FusionPolicy()
        self._fused: FusedSet | None = None

    @property
    def component(self) -> str:
        """Its first name, which adapters know its changes by."""
        return self.components[0]

    def weight_shape(self, targets: Sequence[Target]) -> tuple[int, ...]:
        """[O, I, *K] of the checkpoint's layer whose rows the targets are."""
        return (targets[-1].source_stop, *weight_shape(self._layers[targets[0].layer])[1:])

    def weight(self, targets: Sequence[Target]) -> Tensor:
        """The weight of that layer in float32; as it was loaded, also while a set is fused."""
        parts = [self._layer_weight(each.layer)[each.start : each.stop] for each in targets]
        return torch.cat(parts).to(self.device)

    def changes(self, target: Target, delta: Delta) -> list[Change]:
        """A change of rows of a whole layer as changes of what this rank computes with."""
        change = Change(target, delta)
        shard = None if self._shares.gathered else self._shares.shards.get(f"{target.layer}.weight")
        return [change] if shard is None else change.within(shard)

    def with_branches(self, rows: RowAdapters) -> AbstractContextManager[None]:
        """Within it, each row of a forward pass has its adapters applied, beside the layers."""
        return branches(self.module, self.component, rows) if any(rows) else nullcontext()

    def with_adapters(self, rows: RowAdapters, max_fused_bytes: int) -> AbstractContextManager[None]:
        """The same; a set that is used much, of which all rows are, is applied within the weights.

        Weights that stream, or are stored in eight bits, are left alone.

        Args:
            rows: what each row applies.
            max_fused_bytes: that a second copy of the changed layers may take.
        """
        applied = rows[0]
        if self._can_fuse and applied and all(row == applied for row in rows):
            self._consider(applied, max_fused_bytes)
            if self._fused is not None and self._fused.key == set_key(applied):
                return self._fused.in_place(self.module)
        return self.with_branches(rows)

    def _layer_weight(self, path: str) -> Tensor:
        """[O, I, *K] in float32. A rank with shards has it from the checkpoint: the others would have to be asked, and
        they may be computing."""
        if self._whole is not None and self._shares.shards:
            return self._whole.read(f"{path}.weight", self.dtype).float()
        with self._weights.at_home():
            return dense_weight(self._layers[path]).float()

    def _consider(self, applied: Sequence[Applied], max_fused_bytes: int) -> None:
        """Fuse the set if it is due, and its copies of layers fit."""
        is_due = self._policy.is_due(set_key(applied), None if self._fused is None else self._fused.key)
        if is_due and fused_bytes(self.module, self.component, applied, self.dtype) <= max_fused_bytes:
            self._fused = None  # its memory goes before the next one's comes
            self._fused = fuse(self.module, self.component, applied)

    def forget(self, adapter: Adapter) -> None:
        """Drop the fused set if the adapter is of it."""
        if self._fused is not None and any(fingerprint == adapter.fingerprint for fingerprint, _ in self._fused.key):
            self._fused = None
