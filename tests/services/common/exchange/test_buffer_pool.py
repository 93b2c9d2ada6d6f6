"""Laws of the buffer pool: a buffer is nobody else's while a view of it lives, and is used again after."""

from __future__ import annotations

import gc
import resource
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.common.exchange.buffer_pool import BufferPool, size_class

MIB = 1024 * 1024


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_a_buffer_comes_back_when_its_last_view_is_gone() -> None:
    pool = BufferPool(16 * MIB)
    view = pool.take(MIB)
    first, part = address(view), view[5:9]
    del view
    gc.collect()
    assert pool.idle_bytes == 0
    del part
    gc.collect()
    assert pool.idle_bytes == MIB
    assert address(pool.take(MIB)) == first
    assert pool.idle_bytes == MIB  # nothing kept the view that was just taken


def test_a_tensor_that_views_a_buffer_keeps_it() -> None:
    pool = BufferPool(16 * MIB)
    tensor = torch.frombuffer(pool.take(MIB), dtype=torch.float32).reshape(512, 512)[7:9]
    tensor.fill_(3.0)
    gc.collect()
    other = pool.take(MIB)
    other[:] = bytes(MIB)
    assert torch.equal(tensor, torch.full((2, 512), 3.0))
    del tensor, other
    gc.collect()
    assert pool.idle_bytes == 2 * MIB


def test_a_buffer_may_come_back_in_any_thread() -> None:
    pool = BufferPool(16 * MIB)
    views = [pool.take(MIB) for _ in range(4)]
    threads = [threading.Thread(target=views.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert pool.idle_bytes == 4 * MIB


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (MIB - 1, 0), (2 * MIB, 2), (9 * MIB, 3)])
def test_no_more_than_the_limit_is_kept(limit: int, kept: int) -> None:
    pool = BufferPool(limit)
    views = [pool.take(MIB) for _ in range(3)]
    views.clear()
    gc.collect()
    assert pool.idle_bytes == kept * MIB


@given(st.integers(0, 2**40))
def test_a_class_holds_its_size_and_wastes_at_most_a_fifth(size: int) -> None:
    capacity = size_class(size)
    assert max(size, 64 * 1024) <= capacity
    assert capacity == 64 * 1024 or capacity * 0.8 <= size
    assert size_class(capacity) == capacity


@pytest.mark.parametrize("size", [0, 1, 65537, MIB + 1])
def test_a_buffer_has_just_the_bytes_asked_for(size: int) -> None:
    view = BufferPool(0).take(size)
    view[:] = bytes(size)
    assert (view.nbytes, view.readonly) == (size, False)


def test_what_would_not_be_kept_costs_no_memory_before_it_is_filled() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    view = BufferPool(256 * MIB).take(1024 * MIB)
    assert view.nbytes == 1024 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 512 * 1024


def test_more_than_the_system_has_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no memory for a tensor of"):
        BufferPool(0).take(2**50)
