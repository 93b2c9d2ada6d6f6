"""A LoRA as it is loaded: the changes of a stage's networks, and what was made of its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.modeling.lora.deltas import Delta
from services.modeling.lora.targets import Target
from services.modeling.parallel.shards import Shard


@dataclass(frozen=True, eq=False)
class Change:
    """A change and the place in the network that it is for."""

    target: Target
    delta: Delta

    def within(self, shard: Shard) -> list[Change]:
        """What it changes of a shard of the layer's weight."""
        if shard.dim == 1:
            return [Change(self.target, self.delta.columns(shard.spans))]
        layer, first, last = self.target.layer, self.target.start, self.target.stop
        return [
            Change(
                Target(layer, at, at + stop - start, self.target.source_start + start - first),
                self.delta.rows(start - first, stop - first),
            )
            for (start, stop), at in shard.within((first, last))
        ]


@dataclass(frozen=True)
class Match:
    """What a stage made of a file's tensors.

    Args:
        layout: that was recognised.
        matched: how many tensors belong to the stage's networks.
        unmatched: names of those that belong to nothing here, and not to another stage's part either.
    """

    layout: str
    matched: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA that is loaded; it lives for as long as the library or a request holds it.

    Args:
        name: what requests call it.
        path: of the file.
        fingerprint: of the file.
        changes: of each of the stage's networks, by component.
        match: what was made of the file.
        nbytes: that it holds on the device.
    """

    name: str
    path: str
    fingerprint: str
    changes: Mapping[str, tuple[Change, ...]]
    match: Match
    nbytes: int


@dataclass(frozen=True)
class Applied:
    """A LoRA that a request applies; two are equal if they are the same one at the same scale."""

    adapter: Adapter
    scale: float

    @property
    def changes(self) -> bool:
        """Whether it changes any network of this stage."""
        return any(self.adapter.changes.values())


SetKey = tuple[tuple[str, float], ...]
"""A set of adapters: each one's fingerprint and scale, in order."""


def set_key(applied: Iterable[Applied]) -> SetKey:
    """Names a set without holding its adapters."""
    return tuple((each.adapter.fingerprint, each.scale) for each in applied)
