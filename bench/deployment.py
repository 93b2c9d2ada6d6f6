"""A deployment of real processes on this machine, whose parts can be killed, frozen, stopped and started again."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.server_process import ServerProcess

STAGES = ("encoder", "denoiser", "decoder")
_HEALTHY_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Deployment:
    """Replicas of every stage, and the gateway in front of them.

    Args:
        stages: the replicas by stage.
        gateway: what clients talk to.
    """

    stages: Mapping[str, Sequence[ServerProcess]]
    gateway: ServerProcess

    @property
    def endpoint(self) -> str:
        """Where clients reach it."""
        return self.gateway.address

    def healthy(self, stage: str) -> int:
        """Replicas of a stage that the gateway gives work to."""
        return int(self.gateway.total("safelight_replicas", stage=stage, healthy="true"))

    def wait_until_healthy(self, stage: str, replicas: int) -> None:
        """Returns when the gateway gives work to so many replicas of a stage.

        Raises:
            TimeoutError: it does not come to that.
        """
        give_up = time.monotonic() + _HEALTHY_SECONDS
        while self.healthy(stage) < replicas:
            if time.monotonic() > give_up:
                raise TimeoutError(f"the gateway sees {self.healthy(stage)} healthy replicas, not {replicas}: {stage}")
            time.sleep(_POLL_SECONDS)


@contextmanager
def run_deployment(
    *, encoders: int = 1, denoisers: int = 1, decoders: int = 1, gateway: Sequence[str] = (), manifest: str = ""
) -> Iterator[Deployment]:
    """Start a deployment with one thread a stage; all of it is killed in the end. Its logs stay when something fails.

    Args:
        encoders: replicas of the stage.
        denoisers: the same.
        decoders: the same.
        gateway: flags of the gateway, beside its replicas.
        manifest: of the models; empty: the demo model.
    """
    logs = Path(tempfile.mkdtemp(prefix="safelight-bench-"))
    counts = dict(zip(STAGES, (encoders, denoisers, decoders), strict=True))
    flags = ("--threads=1", f"--manifest={manifest}")
    stages = {
        stage: [ServerProcess(f"services.{stage}", logs / f"{stage}-{n}.log", *flags) for n in range(count)]
        for stage, count in counts.items()
    }
    replicas = (f"--{stage}s={','.join(server.address for server in servers)}" for stage, servers in stages.items())
    deployment = Deployment(stages, ServerProcess("gateway", logs / "gateway.log", *replicas, *gateway))
    try:
        _start(deployment)
        yield deployment
    except BaseException:
        sys.stderr.write(f"the servers' logs are in {logs}\n")
        raise
    else:
        shutil.rmtree(logs)
    finally:
        for server in _servers(deployment):
            server.kill()


def _start(deployment: Deployment) -> None:
    for server in _servers(deployment):
        server.start()
    for server in _servers(deployment):
        server.wait_until_serving()
    for stage, servers in deployment.stages.items():
        deployment.wait_until_healthy(stage, len(servers))


def _servers(deployment: Deployment) -> list[ServerProcess]:
    return [*(server for servers in deployment.stages.values() for server in servers), deployment.gateway]
