"""The layers of a network that LoRAs can change, by their names in the checkpoints that LoRAs are trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from services.modeling.layers import Upsample
from services.modeling.lora.layouts import flat
from services.modeling.weights import Piece, Source


@dataclass(frozen=True)
class Naming:
    """How one checkpoint layout calls a network's tensors.

    Args:
        sources: for each of the network's own tensors, those of the checkpoint that make it, joined on dimension 0.
        prefix: of all names in the checkpoint, which LoRAs leave out.
    """

    sources: Mapping[str, tuple[Source, ...]]
    prefix: str = ""


@dataclass(frozen=True)
class Target:
    """Rows of a layer's weight that are rows of a layer of the checkpoint.

    Args:
        layer: path of the module in the network.
        start: first row of it.
        stop: the row after the last.
        source_start: the first of these rows in the checkpoint's layer.
    """

    layer: str
    start: int
    stop: int
    source_start: int = 0

    @property
    def source_stop(self) -> int:
        """The row after the last in the checkpoint's layer."""
        return self.source_start + self.stop - self.start

    def joined(self, other: Target) -> Target | None:
        """Both as one, if the other goes on where this one ends."""
        here, there = (self.layer, self.stop, self.source_stop), (other.layer, other.start, other.source_start)
        return replace(self, stop=other.stop) if here == there else None


def weight_names(network: nn.Module) -> list[str]:
    """Names of the weights that can be changed, in whatever form they are stored."""
    return [f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def find_targets(network: nn.Module, namings: Sequence[Naming]) -> dict[str, tuple[Target, ...]]:
    """Where the rows of each of a checkpoint's layers lie, in order, by its name in each of the namings, dots as
    underscores."""
    found: dict[str, list[Target]] = {}
    for naming in namings:
        parts: dict[str, list[Target]] = defaultdict(list)
        for name, target in _targets(network, naming):
            parts[flat(name.removeprefix(naming.prefix).removesuffix(".weight"))].append(target)
        found |= parts
    return {name: _joined(sorted(targets, key=lambda each: each.source_start)) for name, targets in found.items()}


def _targets(network: nn.Module, naming: Naming) -> Iterator[tuple[str, Target]]:
    """A target for each source of each layer, by the source's name."""
    for own, sources in naming.sources.items():
        path, _, kind = own.rpartition(".")
        if kind != "weight" or (layer := _adaptable(network, path)) is None:
            continue
        height = weight_shape(network.get_submodule(layer))[0] // len(sources)
        for index, source in enumerate(sources):
            piece = source if isinstance(source, Piece) else Piece(source)
            yield piece.name, Target(layer, index * height, (index + 1) * height, piece.index * height)


def _joined(targets: Sequence[Target]) -> tuple[Target, ...]:
    joined = [targets[0]]
    for target in targets[1:]:
        if longer := joined[-1].joined(target):
            joined[-1] = longer
        else:
            joined.append(target)
    return tuple(joined)


def _adaptable(network: nn.Module, path: str) -> str | None:
    """Path of the module that computes with a weight, an Upsample for its convolution; None: it is of another kind."""
    above, _, _ = path.rpartition(".")
    if isinstance(network.get_submodule(above), Upsample):
        return above
    return path if isinstance(network.get_submodule(path), nn.Linear | nn.Conv2d) else None


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """[O, I, *K] of the weight of a target's layer, packed or not."""
    if isinstance(layer, Upsample):
        layer = layer.conv
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    assert isinstance(layer, nn.Linear), "find_targets gives no others"
    return (layer.out_features, layer.in_features)
