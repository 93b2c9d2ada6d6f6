"""`python -m services.denoiser.ranks`: ranks of a machine beside the denoiser's own, started again whenever they end.

The secret is SAFELIGHT_RANK_SECRET, the denoiser's `rank_secret`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import time
from multiprocessing import AuthenticationError
from subprocess import Popen

from services.common.logs import configure_logs
from services.denoiser.ranks.entrance import enter
from services.denoiser.ranks.process import start_process

_log = logging.getLogger("safelight.ranks")
_PAUSE_SECONDS = 0.5


class Slot:
    """One rank of this machine, in one process after the other.

    Args:
        address: host and port of the denoiser's entrance.
        secret: that it asks for.
        rank: in the group.
    """

    def __init__(self, address: tuple[str, int], secret: str, rank: int) -> None:
        self._address, self._secret, self._rank = address, secret, rank
        self._process: Popen[bytes] | None = None

    def keep(self) -> None:
        """Have a process at the denoiser whenever that is there; returns never."""
        while True:
            try:
                connection = enter(self._address, self._secret, self._rank)
            except (OSError, EOFError) as error:
                _log.debug("the denoiser is not there: %s", error)
            except AuthenticationError:
                _log.error("the denoiser has another secret", extra={"rank": self._rank})
            else:
                self._process = start_process(connection.fileno())
                connection.close()
                _log.info("rank ended", extra={"rank": self._rank, "exit_code": self._process.wait()})
            time.sleep(_PAUSE_SECONDS)

    def kill(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()


def main() -> None:
    """Until SIGTERM or SIGINT."""
    arguments = _parser().parse_args()
    configure_logs("ranks", arguments.log_level)
    address, secret = (arguments.master_address, arguments.master_port), os.environ.get("SAFELIGHT_RANK_SECRET", "")
    first = arguments.node_rank * arguments.ranks
    slots = [Slot(address, secret, rank) for rank in range(first, first + arguments.ranks)]
    for slot in slots:
        threading.Thread(target=slot.keep, daemon=True).start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    for slot in slots:
        slot.kill()


def _parser() -> argparse.ArgumentParser:
    """Flags, whose defaults are torchrun's variables."""
    parser = argparse.ArgumentParser(prog="python -m services.denoiser.ranks", allow_abbrev=False)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    parser.add_argument("--master-address", default=address, required=address is None, help="the denoiser's machine")
    parser.add_argument("--master-port", type=int, default=port, help="its master_port")
    parser.add_argument("--node-rank", type=int, default=os.environ.get("NODE_RANK", "1"), help="this machine: 1, 2 …")
    parser.add_argument("--ranks", type=int, required=True, help="on this machine, as on every other")
    parser.add_argument("--log-level", default="info", help="debug, info, warning or error")
    return parser


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
