"""Embeddings of prompts and pictures that were computed before, newest use last, within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from torch import Tensor

from services.modeling.lora.adapter import SetKey


class EmbeddingKey(NamedTuple):
    """What an embedding depends on; `model` and `adapters` name weights by their fingerprints, `adapters` with scales.

    `alone` marks an embedding whose prompt was encoded by itself: the batch changes the rounding.
    """

    model: str
    token_ids: tuple[int, ...]
    clip_skip: int
    alone: bool
    adapters: SetKey = ()


class EmbeddingCache:
    """Least recently used embeddings go when a new one would exceed `max_bytes`. Confined to the event loop.

    `bytes` is what it holds now. Callers share the tensors and must not write to them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Mapping[str, Tensor]] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> Mapping[str, Tensor] | None:
        """The named tensors of a prompt or picture, which become the most recently used, or None."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of a prompt or picture; what is beyond the bound is not kept."""
        size = _size(tensors)
        if size > self._max_bytes:
            return
        self._discard(key)
        self._entries[key] = {name: _alone(tensor) for name, tensor in tensors.items()}
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._discard(next(iter(self._entries)))

    def __len__(self) -> int:
        return len(self._entries)

    def _discard(self, key: Hashable) -> None:
        replaced = self._entries.pop(key, None)
        if replaced is not None:
            self.bytes -= _size(replaced)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of something larger that it would keep alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
