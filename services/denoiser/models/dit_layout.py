"""How the checkpoints of a transformer name its weights: tables from our layers to theirs, one for each layout.

The original layouts name their tensors alike in files of their own, in ComfyUI's all-in-one files (under
`model.diffusion_model.`) and in GGUF files.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.modeling.weights import Checkpoint, CheckpointError, Piece, Source

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PREFIXES = ("model.diffusion_model.", "")

Sources = dict[str, tuple[Source, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name the weights.

    layers: by our layers, whose parameters are `weight` and `bias`, or our other parameters, those of the checkpoint.
    parts: by our layers that are made of parts of one of the checkpoint's, which ones, and how many there are.
    prefix: of every name.
    """

    layers: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    prefix: str = ""

    def name(self, own: str) -> str:
        """The (first) tensor of the checkpoint that makes our parameter `own`."""
        return self._names(own)[0]

    def sources(self, names: Collection[str]) -> Sources:
        """For each of the model's parameters, the tensors of the checkpoint, or the pieces of one, that make it."""
        return {own: self._sources(own) for own in names}

    def _sources(self, own: str) -> tuple[Source, ...]:
        names = self._names(own)
        layer = _NUMBER.sub("{}", own).rpartition(".")[0]
        if layer not in self.parts:
            return names
        indices, parts = self.parts[layer]
        return tuple(Piece(names[0], index, parts) for index in indices)

    def _names(self, own: str) -> tuple[str, ...]:
        template, numbers = _NUMBER.sub("{}", own), _NUMBER.findall(own)
        layer, _, kind = template.rpartition(".")
        theirs = self.layers.get(template) or tuple(f"{name}.{kind}" for name in self.layers[layer])
        return tuple(self.prefix + name.format(*numbers) for name in theirs)


def layout_of(checkpoint: Checkpoint, layouts: Sequence[Layout], probe: str, architecture: str) -> Layout:
    """Which of the layouts, and with which prefix, `checkpoint` has: `probe` is one of our parameters.

    Raises CheckpointError, naming the architecture, if it has none of them.
    """
    candidates = [replace(layout, prefix=prefix) for layout in layouts for prefix in _PREFIXES]
    for layout in candidates:
        if layout.name(probe) in checkpoint:
            return layout
    raise CheckpointError(
        f"{checkpoint} holds no {architecture}: none of {', '.join(layout.name(probe) for layout in candidates)}"
    )
