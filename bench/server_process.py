"""One server as a process of its own, on ports that it keeps when it is started again."""

from __future__ import annotations

import itertools
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from safelight.embedded import server_environment, server_root

_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_SCRAPE_SECONDS = 5.0
# Below the ports that systems give to outgoing connections, so that a port stays free while its server is down.
_PORTS = itertools.count(random.randint(15_000, 30_000))


class ServerProcess:
    """`python -m <module> <flags>`, listening on 127.0.0.1.

    Args:
        module: e.g. "services.denoiser".
        log: file that its log is appended to.
        flags: of the server, without its addresses.
    """

    def __init__(self, module: str, log: Path, *flags: str) -> None:
        self.module = module
        self.log = log
        self.address, self._metrics_port = f"127.0.0.1:{free_port()}", free_port()
        self._command = [sys.executable, "-m", module, f"--listen={self.address}"]
        self._command += [f"--metrics-port={self._metrics_port}", *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, running or ended.

        Raises:
            RuntimeError: it was never started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.module} was not started")
        return self._process

    def start(self) -> None:
        """Start the process; it serves some seconds later."""
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command, cwd=server_root(), env=server_environment(), stdin=subprocess.DEVNULL, stderr=log
            )

    def wait_until_serving(self) -> None:
        """Returns when its log says that it serves.

        Raises:
            RuntimeError: it ended before, or takes too long; with the end of its log.
        """
        give_up = time.monotonic() + _START_SECONDS
        while '"message": "serving"' not in (log := self._log_since_start()):
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{self.module} at {self.address} does not serve:\n{log[-2000:]}")
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL, and wait for its end; nothing happens to one that has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: its connections stay open, and it is silent."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on where it was frozen."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, limit_seconds: float) -> int:
        """SIGTERM, and wait for its end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after the limit.
        """
        self.process.terminate()
        return self.process.wait(limit_seconds)

    @property
    def resident_bytes(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    def total(self, sample_name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have the labels, as Prometheus would scrape them now.

        Raises:
            OSError: it does not answer.
        """
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=_SCRAPE_SECONDS
        ) as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == sample_name and labels.items() <= sample.labels.items()
        )

    def _log_since_start(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on; another one at each call."""
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
