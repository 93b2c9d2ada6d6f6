"""A journal is written once and read by any number of calls, each from where it wants."""

from __future__ import annotations

import asyncio

import pytest

from gateway.journal import Journal
from safelight.errors import OverloadedError
from safelight.v1.generation_service_pb2 import GenerateProgress, GenerateResponse
from safelight.v1.work_pb2 import FileChunk


def journal_that(keeps: bool) -> Journal:
    return Journal(keeps, lambda change: None)


def progress(step: int) -> GenerateResponse:
    return GenerateResponse(progress=GenerateProgress(stage="denoiser", step=step, steps=9))


async def numbers(journal: Journal, after: int = 0) -> list[int]:
    return [event.sequence async for event in journal.read(after)]


async def test_events_are_numbered_from_one_without_gaps() -> None:
    journal = journal_that(keeps=True)
    for step in (3, 4, 5):
        journal.append(progress(step))
    journal.end()
    assert [(event.sequence, event.progress.step) async for event in journal.read()] == [(1, 3), (2, 4), (3, 5)]


async def test_a_reader_gets_what_comes_after_the_number_it_has() -> None:
    journal = journal_that(keeps=True)
    for step in range(5):
        journal.append(progress(step))
    journal.end()
    assert await numbers(journal, after=3) == [4, 5]
    assert await numbers(journal, after=5) == []


async def test_a_reader_of_another_run_gets_everything() -> None:
    journal = journal_that(keeps=True)
    journal.append(progress(1))
    journal.end()
    assert await numbers(journal, after=7) == [1]


async def test_readers_get_events_as_they_are_written_and_none_misses_one() -> None:
    journal = journal_that(keeps=True)
    readers = [asyncio.create_task(numbers(journal)) for _ in range(3)]
    for step in range(4):
        journal.append(progress(step))
        await asyncio.sleep(0)
    late = asyncio.create_task(numbers(journal, after=2))
    journal.end()
    assert await asyncio.gather(*readers, late) == [[1, 2, 3, 4]] * 3 + [[3, 4]]


async def test_every_reader_gets_the_error_after_the_last_event() -> None:
    journal = journal_that(keeps=True)
    journal.append(progress(1))
    journal.end(ValueError("broken"))
    for _ in range(2):
        reader = journal.read()
        assert (await anext(reader)).sequence == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(reader)


async def test_writing_never_waits_for_a_reader_and_size_tells_what_is_kept() -> None:
    journal = journal_that(keeps=True)
    for _ in range(100):
        journal.append(GenerateResponse(chunk=FileChunk(data=bytes(1000))))
    assert journal.size >= 100_000


async def test_a_journal_that_keeps_nothing_forgets_what_its_reader_has() -> None:
    journal = journal_that(keeps=False)
    for _ in range(3):
        journal.append(GenerateResponse(chunk=FileChunk(data=bytes(1000))))
    journal.end()
    sizes = [journal.size async for _ in journal.read()]
    assert sizes[-1] == 0
    assert sizes == sorted(sizes, reverse=True)


async def test_whoever_counts_the_bytes_is_told_of_every_change() -> None:
    total = 0

    def count(change: int) -> None:
        nonlocal total
        total += change

    journals = [Journal(keeps, count) for keeps in (True, False)]
    for journal in journals:
        journal.append(progress(1))
        journal.append(progress(2))
        await anext(journal.read())
        assert total == sum(each.size for each in journals)
    for journal in journals:
        journal.drop()
    assert total == 0


async def test_a_reader_of_a_dropped_journal_is_told_to_come_back() -> None:
    journal = journal_that(keeps=True)
    journal.append(progress(1))
    reader = journal.read()
    await anext(reader)
    journal.drop()
    with pytest.raises(OverloadedError, match="journal_bytes") as caught:
        await anext(reader)
    assert journal.size == 0
    assert caught.value.retry_after_seconds
