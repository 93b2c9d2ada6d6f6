"""Laws of the entrance: who has the secret comes in as the rank he says, nobody else, and nobody waits for ever."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError

import pytest

from bench.server_process import free_port
from safelight.errors import CheckpointError
from services.denoiser.ranks.entrance import Entrance, enter, hang_up


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def address() -> tuple[str, int]:
    return "127.0.0.1", free_port()


def test_ranks_with_the_secret_come_in_and_others_do_not(pool: ThreadPoolExecutor, address: tuple[str, int]) -> None:
    entrance = Entrance(address, "secret")
    admitted = pool.submit(entrance.admit, [2, 3])
    with pytest.raises(AuthenticationError):
        enter(address, "guess", 2)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    unknown = enter(address, "secret", 1)
    ranks = {rank: enter(address, "secret", rank) for rank in (3, 2)}
    connections = admitted.result(10)
    assert sorted(connections) == [2, 3]
    for rank, connection in connections.items():
        connection.send(f"you are {rank}")
        assert ranks[rank].recv() == f"you are {rank}"
    with pytest.raises((EOFError, OSError)):
        unknown.recv()
    entrance.close()
    for each in (unknown, *ranks.values(), *connections.values()):
        each.close()


def test_whoever_waits_at_a_closed_entrance_is_told(pool: ThreadPoolExecutor, address: tuple[str, int]) -> None:
    entrance = Entrance(address, "secret")
    admitted = pool.submit(entrance.admit, [1])
    entrance.close()
    with pytest.raises(OSError, match=r"\w"):
        admitted.result(10)


def test_a_reader_sees_that_it_was_hung_up_on(pool: ThreadPoolExecutor, address: tuple[str, int]) -> None:
    entrance = Entrance(address, "secret")
    admitted = pool.submit(entrance.admit, [1])
    theirs = enter(address, "secret", 1)
    ours = admitted.result(10)[1]
    reading = pool.submit(ours.recv)
    hang_up(ours)
    with pytest.raises(EOFError):
        reading.result(10)
    with pytest.raises(EOFError):
        theirs.recv()
    entrance.close()
    theirs.close()
    ours.close()


def test_an_address_that_is_taken_is_named(address: tuple[str, int]) -> None:
    with socket.create_server(address), pytest.raises(CheckpointError, match=f"master_port: 127.0.0.1:{address[1]}"):
        Entrance(address, "secret")
