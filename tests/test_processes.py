"""The four services as processes of their own, over TCP, as a deployment runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight import Client, GenerationOptions, GenerationResult, Progress

ROOT = Path(__file__).parents[1]


class ServerProcess:
    """`python -m <module>` on free ports; its log tells which."""

    def __init__(self, module: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--listen=127.0.0.1:0", "--metrics-port=0", "--drain-seconds=5", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python"), "OMP_WAIT_POLICY": "PASSIVE"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address, self.metrics_port = "", 0

    def wait_until_serving(self) -> None:
        """Read the log up to the line that says where it serves; the rest is read and dropped in a thread."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {}
            if entry.get("message") == "serving":
                self.address, self.metrics_port = entry["address"], entry["metrics_port"]
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise AssertionError(f"ended before it served, with exit code {self.process.wait()}")

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def deployment(tiny_manifest: str) -> Iterator[dict[str, ServerProcess]]:
    manifest = f"--manifest={tiny_manifest}"
    servers = {
        "encoder": ServerProcess("services.encoder", manifest),
        "denoiser": ServerProcess("services.denoiser", manifest),
        "other denoiser": ServerProcess("services.denoiser", manifest),
        "decoder": ServerProcess("services.decoder", manifest),
    }
    try:
        for server in servers.values():
            server.wait_until_serving()
        servers["gateway"] = ServerProcess(
            "gateway",
            f"--encoders={servers['encoder'].address}",
            f"--denoisers={servers['denoiser'].address},{servers['other denoiser'].address}",
            f"--decoders={servers['decoder'].address}",
        )
        servers["gateway"].wait_until_serving()
        yield servers
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
            assert server.process.stderr is not None
            server.process.stderr.close()


@pytest.mark.timeout(300)
def test_a_deployment_draws_survives_a_kill_shows_its_metrics_and_drains(
    deployment: dict[str, ServerProcess],
) -> None:
    with Client(deployment["gateway"].address) as client:
        expected = client.generate("a cat", steps=8, seed=1).images[0]
        killed = False
        for event in client.stream(GenerationOptions(prompt="a cat", steps=8, seed=1)):
            if isinstance(event, Progress) and event.stage == "denoiser" and not killed:
                busy = next(
                    name
                    for name in ("denoiser", "other denoiser")
                    if 'safelight_running{stage="denoiser"} 1.0' in deployment[name].metrics()
                )
                deployment[busy].end(signal.SIGKILL)
                killed = True
            last = event
    assert isinstance(last, GenerationResult)
    assert last.images[0].data == expected.data
    metrics = deployment["gateway"].metrics()
    assert 'safelight_requests_total{code="OK",method="safelight.v1.GenerationService/Generate"} 2.0' in metrics
    assert 'safelight_retries_total{stage="denoiser"} 1.0' in metrics
    assert 'safelight_tensor_bytes_total{path="inline"}' in deployment["decoder"].metrics()
    codes = [deployment[name].end(signal.SIGTERM) for name in ("gateway", "encoder", "decoder")]
    assert codes == [0, 0, 0]
