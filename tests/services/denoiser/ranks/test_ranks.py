"""Laws of asking ranks: when an error is the request's and all go on, and when they are lost. The ranks are threads."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest

from safelight.errors import InvalidRequestError
from services.denoiser.ranks.alive import Alive
from services.denoiser.ranks.commands import Failed, Leave, Order
from services.denoiser.ranks.messages import Channel, pack
from services.denoiser.ranks.ranks import Member, Ranks, RanksLostError
from services.modeling.lora.adapter import Adapter

Answer = Callable[[Order], Any]
Start = Callable[..., Ranks]
BAD = InvalidRequestError.of("prompt", "is bad")


class Silence(Exception):
    """A rank gives no answer."""


class Death(Exception):
    """A rank ends."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ranks that answer as the functions say."""
    started: list[Ranks] = []
    with ThreadPoolExecutor() as pool:

        def start_ranks(*answers: Answer) -> Ranks:
            members = []
            for answer in answers:
                ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
                members.append(Member(Channel(ours)))
                pool.submit(_obey, Channel(theirs), answer)
            started.append(Ranks(members, Alive[Adapter]()))
            return started[-1]

        yield start_ranks
        for ranks in started:
            ranks.end()


def _obey(channel: Channel, answer: Answer) -> None:
    try:
        while True:
            order = channel.receive()
            with suppress(Silence):
                channel.send(pack(answer(order)))
    except (Death, EOFError):
        channel.connection.close()


def saying(answer: Any) -> Answer:
    def say(order: Order) -> Any:
        if isinstance(answer, (Silence, Death)):
            raise answer
        return answer

    return say


def test_answers_come_in_the_order_of_the_ranks(start: Start) -> None:
    def slowly(order: Order) -> Any:
        time.sleep(0.02)
        return "first"

    ranks = start(slowly, saying("second"))
    assert ranks.call_all(Leave(), 10.0) == ["first", "second"]
    assert ranks.running == 2


def test_what_all_fail_with_is_raised_and_they_go_on(start: Start) -> None:
    ranks = start(saying(Failed(BAD)), saying(Failed(BAD)))
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="is bad"):
            ranks.call_all(Leave(), 10.0)
    assert not ranks.lost.is_set()


def test_where_one_fails_and_another_waits_they_are_lost_by_that_error(start: Start) -> None:
    ranks = start(saying(Failed(BAD)), saying(Silence()))
    with pytest.raises(RanksLostError, match="no answer from rank 1") as caught:
        ranks.call_all(Leave(), 60.0)
    assert caught.value.error is not None
    assert str(caught.value.error) == str(BAD)
    assert ranks.lost.wait(10)


def test_a_death_is_seen_at_once_also_where_others_fail_by_it(start: Start) -> None:
    ranks = start(saying(Failed(RuntimeError("connection closed by peer"))), saying(Death()))
    with pytest.raises(RanksLostError, match="a rank has died"):
        ranks.call_all(Leave(), 60.0)
    with pytest.raises(RanksLostError, match="a rank has died"):
        ranks.call_all(Leave(), 60.0)
    assert ranks.running == 0


def test_ranks_that_do_not_answer_in_time_are_lost(start: Start) -> None:
    ranks = start(saying(1), saying(Silence()))
    with pytest.raises(RanksLostError, match="no answer from rank 1"):
        ranks.call_all(Leave(), 0.05)
    assert ranks.lost.wait(10)
