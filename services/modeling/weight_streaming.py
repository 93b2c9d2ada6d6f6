"""Weights that are not always on the device: they come when they are needed, and stream where they don't all fit.

A network is a list of blocks in the order in which they compute. The plan (residency.py) says which of them stay. The
others have their home in host memory; while one computes, the next one is copied beside it (weight_transfer.py) into
the second of two slots. Outside of its block's computation a weight is always seen at its home. Where ranks share a
network, the home of a block's weights is a part of them on each rank (parallel/fsdp.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from services.modeling.block_weights import BlockWeights, Flatten, FlatWeights
from services.modeling.residency import Residency, ResidencyPlan, plan_residency
from services.modeling.weight_transfer import Moment, Transfer


@dataclass(frozen=True)
class WeightBlock:
    """Modules that compute together, and of which no other block computes a part.

    Args:
        name: in error messages.
        modules: whose calls need the block's weights; a weight that several blocks have belongs to the first.
    """

    name: str
    modules: tuple[nn.Module, ...]


class WeightAccount:
    """What a network's weights take of the device.

    Args:
        resident_bytes: now.
    """

    def __init__(self, resident_bytes: int = 0) -> None:
        self.resident_bytes = self.peak_bytes = resident_bytes
        self.streamed_bytes = 0
        self.on_streamed: Callable[[int], None] = lambda size: None

    def take(self, size: int) -> None:
        """Memory of the device was taken, or given back: a negative size."""
        self.resident_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def streamed(self, size: int) -> None:
        """Weights were copied to the device for one use."""
        self.streamed_bytes += size
        self.on_streamed(size)


class _Visitor:
    """A block that comes to the device with the network's work and leaves after it."""

    def __init__(self, weights: BlockWeights, home: Tensor) -> None:
        self.weights, self.home = weights, home
        self.room: Tensor | None = None
        self.arrival: Moment | None = None


@dataclass(eq=False)
class _Slot:
    """Room for one streamed block after the other.

    Args:
        memory: as large as the largest.
        free: when what computes with the block here now, or did last, will be done.
        block: index of the block that is here or on its way; None: none.
        arrival: when it will be here; None: nothing ever was on its way.
    """

    memory: Tensor
    free: Moment
    block: int | None = None
    arrival: Moment | None = None


class OffloadedWeights:
    """The weights of one network that stay, visit or stream; made for all of its blocks' parameters.

    From here on the blocks' modules fetch their weights when they are called, from whichever thread: one block
    computes at a time.

    Args:
        blocks: in the order in which they compute; a parameter that none of them has is left as it is.
        residency: how much may be on the device, and until when.
        transfer: the way there.
        flatten: how blocks are kept.
    """

    def __init__(
        self, blocks: Sequence[WeightBlock], residency: Residency, transfer: Transfer, flatten: Flatten = FlatWeights
    ) -> None:
        self.account = WeightAccount()
        self._transfer = transfer
        self._lock = threading.RLock()
        self._active: str | None = None
        flat = _flattened(blocks, flatten)
        self.plan: ResidencyPlan = plan_residency([weights.size for weights in flat], residency.budget_bytes)
        self._leaves = residency.leaves_when_idle
        self._visitors: list[_Visitor] = []
        self._streamed: list[BlockWeights] = []
        self._homes: list[Tensor] = []
        self._slots: list[_Slot] = []
        for block, weights, stays in zip(blocks, flat, self.plan.resident, strict=True):
            self._settle(block, weights, stays=stays)
        count = len(self._streamed)
        self._next = {index: (index + 1) % count for index in range(count)}
        self._last: int | None = None

    def leave(self) -> None:
        """The network has no work: give the device back, if that is wanted."""
        if self._leaves:
            with self._lock:
                self._leave()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Keeps every weight where it stays meanwhile: what is changed there now lasts."""
        with self._lock:
            self._leave()
            yield

    def _settle(self, block: WeightBlock, weights: BlockWeights, *, stays: bool) -> None:
        """Bring a block's weights to where they stay from now on."""
        if stays and not self._leaves:
            weights.settle(self._room(weights.size))
            return
        home = (self._room if weights.home_on_device else self._transfer.home)(weights.home_size)
        weights.settle(home)
        if stays:
            visitor = _Visitor(weights, home)
            self._visitors.append(visitor)
            _guard(block, lambda: self._visiting(visitor))
        else:
            index = len(self._streamed)
            self._streamed.append(weights)
            self._homes.append(home)
            _guard(block, lambda: self._streaming(index))

    def _room(self, size: int) -> Tensor:
        with torch.inference_mode(False):  # a parameter outlives the computation that fetched it
            memory = self._transfer.room(size)
        self.account.take(size)
        return memory

    @contextmanager
    def _visiting(self, visitor: _Visitor) -> Iterator[None]:
        with self._alone(visitor.weights.name):
            self._bring_visitors()
            self._wait(visitor.arrival)
            visitor.arrival = None
            yield

    @contextmanager
    def _streaming(self, index: int) -> Iterator[None]:
        with self._alone(self._streamed[index].name):
            self._bring_visitors()
            self._make_slots()
            slot = self._present(index)
            self._wait(slot.arrival)
            self._streamed[index].show(slot.memory)
            try:
                self._prefetch_after(index, slot)
                yield
            finally:
                self._streamed[index].retire(self._homes[index])
                slot.free = self._transfer.now()

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._lock:
            if self._active is not None:
                raise RuntimeError(f"block {name} computes within block {self._active}: they must be one block")
            self._active = name
            try:
                yield
            finally:
                self._active = None

    def _bring_visitors(self) -> None:
        """Start every visitor's way to the device, in order; each waits for its own arrival only."""
        if not self._visitors or self._visitors[-1].room is not None:
            return
        try:
            for visitor in self._visitors:
                visitor.room = self._room(visitor.weights.size)
                visitor.arrival = self._fetch(visitor.weights, visitor.home, visitor.room, self._transfer.now())
                visitor.weights.show(visitor.room)
        except BaseException:
            self._leave()
            raise

    def _make_slots(self) -> None:
        while len(self._slots) < self.plan.slots:
            self._slots.append(_Slot(self._room(self.plan.slot_bytes), self._transfer.now()))

    def _present(self, index: int, busy: _Slot | None = None) -> _Slot:
        """The slot with a block, which is fetched, though not into `busy`, if it is in none."""
        if found := next((slot for slot in self._slots if slot.block == index), None):
            return found
        following = self._next[index]
        slot = min((slot for slot in self._slots if slot is not busy), key=lambda slot: slot.block == following)
        slot.block = None  # until the copy is on its way: it may fail
        slot.arrival = self._fetch(self._streamed[index], self._homes[index], slot.memory, slot.free)
        slot.block = index
        return slot

    def _prefetch_after(self, index: int, busy: _Slot) -> None:
        """Fetch the block that came after this one the last time; the first time, the next in order."""
        if self._last not in (None, index):
            self._next[self._last] = index
        self._last = index
        if self.plan.slots > 1:
            self._present(self._next[index], busy)

    def _fetch(self, weights: BlockWeights, home: Tensor, room: Tensor, after: Moment) -> Moment:
        self.account.streamed(weights.size)
        return self._transfer.queue(partial(weights.fetch, home, room), after)

    def _wait(self, arrival: Moment | None) -> None:
        if arrival is not None:
            self._transfer.wait(arrival)

    def _leave(self) -> None:
        """Only what stays is on the device afterwards."""
        before = self.account.resident_bytes
        for slot in self._slots:
            self._wait(slot.arrival)
            self.account.take(-slot.memory.numel())
        for visitor in self._visitors:
            if visitor.room is not None:
                self._wait(visitor.arrival)
                visitor.weights.retire(visitor.home)
                self.account.take(-visitor.room.numel())
                visitor.room = visitor.arrival = None
        self._slots.clear()
        self._last = None
        if self.account.resident_bytes < before:
            self._transfer.trim()


def _flattened(blocks: Sequence[WeightBlock], flatten: Flatten) -> list[BlockWeights]:
    """Each block's own parameters."""
    seen: set[nn.Parameter] = set()
    flat: list[BlockWeights] = []
    for block in blocks:
        own = dict.fromkeys(parameter for module in block.modules for parameter in module.parameters())
        flat.append(flatten(block.name, [parameter for parameter in own if parameter not in seen]))
        seen.update(own)
    return flat


def _guard(block: WeightBlock, using: Callable[[], AbstractContextManager[None]]) -> None:
    """Let the modules compute within `using` only."""
    for module in block.modules:
        object.__setattr__(module, "forward", _within(using, module.forward))


def _within(using: Callable[[], AbstractContextManager[None]], forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with using():
            return forward(*args, **kwargs)

    return guarded
