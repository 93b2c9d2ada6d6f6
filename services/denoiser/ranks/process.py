"""The process of one rank: a child of the service, which holds the other end of its socket.

    python services/denoiser/ranks/process.py DESCRIPTOR

It never outlives the service: the socket closes when that ends, also when it is killed. Run by its path, not by `-m`:
that would put the user's folder on the import path. What the service imports from is in PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path


def start_process(descriptor: int) -> subprocess.Popen[bytes]:
    """A rank that is reached at the other end of the socket; what it prints goes to the service's standard error.

    It is in a session of its own, so that an interrupt from the keyboard lets the service end first.
    """
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), str(descriptor)],
        pass_fds=[descriptor],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
    )


def main() -> None:
    """Obeys until the service closes the socket."""
    own_folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != own_folder]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the service ends it when its own work has ended
    from services.denoiser.ranks.messages import Channel
    from services.denoiser.ranks.rank import obey

    obey(Channel(Connection(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
