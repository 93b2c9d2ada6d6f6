"""Laws of shared slots: who reads another generation than it was told knows; readers can only read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from services.common.exchange.slot_pool import SLOT_BYTES, SlotPool, SlotReader


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    pool = SlotPool(4)
    yield pool
    pool.close()


def read(pool: SlotPool, base: int, generation: int, size: int) -> tuple[bool, bytes]:
    into = bytearray(size)
    return SlotReader(pool.reader_descriptor).read(base, generation, memoryview(into)), bytes(into)


@pytest.mark.parametrize("size", [1, 4096, SLOT_BYTES - 1, SLOT_BYTES])
def test_what_is_written_is_read(pool: SlotPool, size: int) -> None:
    pieces = [bytes([number]) * size for number in range(4)]
    places = [pool.write(slot, memoryview(piece)) for slot, piece in enumerate(pieces)]
    assert [read(pool, *place, size) for place in places] == [(True, piece) for piece in pieces]


def test_a_slot_that_was_used_again_is_told_from_what_it_was(pool: SlotPool) -> None:
    old = pool.write(2, memoryview(b"old"))
    new = pool.write(2, memoryview(b"new"))
    assert read(pool, *old, 3)[0] is False
    assert read(pool, *new, 3) == (True, b"new")


def test_slots_are_borrowed_all_or_none(pool: SlotPool) -> None:
    first = pool.borrow(3)
    assert len(set(first)) == 3
    assert pool.borrow(2) == []
    pool.give_back(first)
    assert len(set(pool.borrow(4))) == 4


def test_a_reader_can_t_write_or_cut_the_memory(pool: SlotPool) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(pool.reader_descriptor, b"x", 0)
    with pytest.raises(OSError, match="Permission denied"):
        mmap.mmap(pool.reader_descriptor, 4096, prot=mmap.PROT_WRITE)
    with pytest.raises(OSError, match=r"Invalid argument|not permitted"):
        os.ftruncate(pool.reader_descriptor, 0)


@pytest.mark.parametrize("base", [-1, 4 * (4096 + SLOT_BYTES), 2**62])
def test_a_slot_that_is_none_is_an_error(pool: SlotPool, base: int) -> None:
    with pytest.raises(ValueError, match="no slot at byte"):
        read(pool, base, 0, 10)


def test_memory_that_could_shrink_under_its_reader_is_refused() -> None:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(ValueError, match="could shrink"):
        SlotReader(descriptor)
    os.close(descriptor)


def test_nothing_with_a_name_is_made(pool: SlotPool) -> None:
    before = set(os.listdir("/dev/shm"))
    pool.write(0, memoryview(b"x"))
    assert set(os.listdir("/dev/shm")) <= before
