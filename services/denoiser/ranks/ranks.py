"""The ranks of a group, from their start to the loss of one."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from subprocess import Popen
from threading import Event, Lock, Thread
from typing import Any

from services.denoiser.ranks.alive import Alive
from services.denoiser.ranks.commands import Command, Failed, Order
from services.denoiser.ranks.entrance import connection_over, hang_up
from services.denoiser.ranks.messages import Channel, Packed, pack
from services.denoiser.ranks.process import start_process
from services.modeling.lora.adapter import Adapter

_log = logging.getLogger("safelight.ranks")

# When a rank has failed, the others either fail too, at about the same time, or wait for it forever.
_AGREEMENT_SECONDS = 2.0
_EXIT_SECONDS = 10.0


class RanksLostError(Exception):
    """A rank has died, hangs, or has failed where the others did not: none of them can go on.

    Args:
        error: what a rank had failed with; None: nothing.
    """

    def __init__(self, message: str, error: Exception | None = None) -> None:
        super().__init__(message)
        self.error = error


@dataclass(frozen=True)
class Member:
    """One rank, as the service reaches it.

    Args:
        channel: to it.
        process: of this machine; None: it is on another one.
    """

    channel: Channel
    process: Popen[bytes] | None = None

    @classmethod
    def started(cls) -> Member:
        """A new process of this machine."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = start_process(theirs.fileno())
        return cls(Channel(connection_over(ours)), process)

    def end(self) -> None:
        """Kill the process; elsewhere it ends itself when it is hung up on."""
        if self.process is not None:
            self.process.kill()
        hang_up(self.channel.connection)

    @property
    def is_running(self) -> bool:
        """Whether it is up, as far as is known."""
        return self.process is None or self.process.poll() is None


@dataclass(eq=False)
class PreparedOnRanks:
    """A conditioning that ranks have prepared; they keep it for as long as this is held.

    Args:
        ranks: that have it; others do not.
        number: they know it by.
        batch_key: see `Denoiser.batch_key`.
    """

    ranks: Ranks
    number: int
    batch_key: Hashable = None


class Ranks:
    """Processes that compute together; once one is lost, they are of no use.

    Their death is seen at their sockets, at once, whatever the others wait for.

    Args:
        members: the ranks, in order.
        adapters: those that the ranks are to keep.
    """

    def __init__(self, members: Sequence[Member], adapters: Alive[Adapter]) -> None:
        self.lost = Event()
        self.prepared: Alive[PreparedOnRanks] = Alive()
        self._adapters = adapters
        self._answers: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._calls, self._ending = Lock(), Lock()
        self._ended = False
        self._members = members
        self._channels = [member.channel for member in members]
        self._relaying = Thread(target=self._relay, name="ranks", daemon=True)
        self._relaying.start()

    def call(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """What the ranks answer to a command each, in order.

        Raises:
            RanksLostError: one is lost, or did not answer for so many seconds: all are killed.
            Exception: what a rank has failed with; all of them are ready for the next command.
        """
        with self._calls:
            try:
                if self.lost.is_set():
                    raise RanksLostError("a rank has died")
                self._send(commands)
                answers = self._collect(seconds)
            except RanksLostError:
                self.kill()
                raise
        if failures := [answer for answer in answers if isinstance(answer, Failed)]:
            raise failures[0].error
        return answers

    def call_all(self, command: Command, seconds: float) -> list[Any]:
        """What the ranks answer to one command; raises as `call`."""
        return self.call([command] * len(self._channels), seconds)

    @property
    def running(self) -> int:
        """Processes that are up."""
        return 0 if self.lost.is_set() else sum(member.is_running for member in self._members)

    def kill(self) -> None:
        """End all processes, whatever they do; `lost` is set soon after."""
        with self._ending:
            for member in () if self._ended else self._members:
                member.end()

    def end(self) -> list[int]:
        """Kill all processes and give their sockets back; returns the exit codes of this machine's."""
        self.kill()
        codes = [member.process.wait(_EXIT_SECONDS) for member in self._members if member.process is not None]
        self._relaying.join()
        with self._ending:
            self._ended = True
            for channel in self._channels:
                channel.connection.close()
        return codes

    def _send(self, commands: Sequence[Command]) -> None:
        prepared = frozenset(each.number for each in self.prepared.all())
        adapters = frozenset(each.fingerprint for each in self._adapters.all())
        packed: dict[int, Packed] = {}
        for channel, command in zip(self._channels, commands, strict=True):
            if id(command) not in packed:
                packed[id(command)] = pack(Order(command, prepared, adapters))
            try:
                channel.send(packed[id(command)])
            except OSError as error:
                raise RanksLostError("a rank takes no command") from error

    def _collect(self, seconds: float) -> list[Any]:
        """An answer of each rank; soon after the first failure there must be one of all the others."""
        answers: dict[int, Any] = {}
        give_up = time.monotonic() + seconds
        while len(answers) < len(self._channels):
            rank, answer = self._next_answer(give_up, answers)
            answers[rank] = answer
            if isinstance(answer, Failed):
                give_up = min(give_up, time.monotonic() + _AGREEMENT_SECONDS)
        return [answers[rank] for rank in sorted(answers)]

    def _next_answer(self, give_up: float, answers: dict[int, Any]) -> tuple[int, Any]:
        left = max(give_up - time.monotonic(), 0.0)
        failure = next((answer.error for answer in answers.values() if isinstance(answer, Failed)), None)
        try:
            answer = self._answers.get(timeout=None if math.isinf(left) else left)
        except Empty:
            silent = sorted(set(range(len(self._channels))) - answers.keys())
            raise RanksLostError(f"no answer from rank {', '.join(map(str, silent))}", failure) from failure
        if answer is None:
            raise RanksLostError("a rank has died", failure) from failure
        return answer

    def _relay(self) -> None:
        """Puts answers where the caller waits for them, until a rank is lost."""
        ranks = {channel.connection: rank for rank, channel in enumerate(self._channels)}
        while not self.lost.is_set():
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection), "nothing else is waited for"
                rank = ranks[connection]
                try:
                    self._answers.put((rank, self._channels[rank].receive()))
                except (EOFError, OSError):
                    self.lost.set()
                    self._answers.put(None)
