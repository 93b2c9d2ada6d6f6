"""The adapters of a network that is on the ranks of a group: they read and apply them, here are their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.denoiser.ranks.commands import AdapterFile, AdapterReading, ReadAdapter, RowFiles
from services.denoiser.ranks.group import RankGroup
from services.modeling.lora.adapter import Adapter, Applied
from services.modeling.lora.network import RowAdapters


class RankedNetwork:
    """Takes the place of an AdaptableNetwork.

    Args:
        group: has the network.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self.rows: tuple[RowFiles, ...] = ()
        """What each row of the pass at hand applies."""
        self.max_fused_bytes = 0

    def read(self, name: str, path: str) -> Adapter:
        """The LoRA of a file; raises what `read_adapter` and `RankGroup.call` do."""
        reading: AdapterReading = self._group.call(ReadAdapter(name, path))[0]
        adapter = Adapter(name, path, reading.fingerprint, {}, reading.match, reading.nbytes)
        self._group.adapters.add(adapter)
        return adapter

    def forget(self, adapter: Adapter) -> None:
        """The ranks do, once nobody holds it."""

    @contextmanager
    def with_branches(self, rows: RowAdapters) -> Iterator[None]:
        """Within it, each row of a pass has its adapters applied, beside the layers."""
        with self.with_adapters(rows, 0):
            yield

    @contextmanager
    def with_adapters(self, rows: RowAdapters, max_fused_bytes: int) -> Iterator[None]:
        """The same; a set that is used much may be applied within the weights."""
        self.rows, self.max_fused_bytes = tuple(map(_files, rows)), max_fused_bytes
        try:
            yield
        finally:
            self.rows, self.max_fused_bytes = (), 0


def _files(row: tuple[Applied, ...]) -> RowFiles:
    return tuple(
        AdapterFile(each.adapter.name, each.adapter.path, each.adapter.fingerprint, each.scale) for each in row
    )
