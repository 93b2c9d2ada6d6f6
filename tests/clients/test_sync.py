"""The blocking client ends what it began: by Ctrl-C, by leaving, and by closing from another thread."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from safelight import Client, GenerationOptions, Progress

LONG = GenerationOptions(prompt="a cat", steps=1000, width=64, height=64)


def test_closing_ends_a_stream_that_another_thread_reads(endpoint: str) -> None:
    client, began = Client(endpoint), threading.Event()

    def read() -> None:
        for event in client.stream(LONG):
            if isinstance(event, Progress):
                began.set()

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        assert began.wait(60)
        client.close()
        with pytest.raises(CancelledError):
            reading.result(60)


def test_a_closed_client_says_so(endpoint: str) -> None:
    client = Client(endpoint)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.models()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.generate("a cat")


def test_an_exception_in_the_callback_ends_the_work_at_once(endpoint: str) -> None:
    def stop(event: object) -> None:
        raise KeyError

    with Client(endpoint) as client:
        with pytest.raises(KeyError):
            client.generate("a cat", steps=1000, width=64, height=64, on_event=stop)
        assert client.generate("a cat", steps=1, width=64, height=64).images[0].steps == 1


def test_many_threads_share_a_client(endpoint: str) -> None:
    def draw(seed: int) -> int:
        return client.generate("a cat", steps=1, width=64, height=64, seed=seed).images[0].seed

    with Client(endpoint) as client, ThreadPoolExecutor(4) as threads:
        assert list(threads.map(draw, range(8))) == list(range(8))
