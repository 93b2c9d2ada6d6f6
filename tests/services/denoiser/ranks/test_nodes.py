"""Ranks of another machine: they come in with the secret, compute their part, and come again when they were lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from bench.server_process import free_port
from safelight.errors import ModelRestartingError
from services.common.settings import SettingsError
from services.denoiser.settings import DenoiserSettings
from tests.support.rank_processes import rank_processes, until_gone
from tests.support.running_denoiser import StartDenoiser
from tests.support.stage_requests import denoise_request, exact


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def node(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A second machine, which happens to be this one, with a rank."""
    process = _node(port, "the secret")
    yield process
    ranks = rank_processes(process.pid)
    process.terminate()
    assert process.wait(30) == 0
    until_gone(ranks)


def _node(port: int, secret: str) -> subprocess.Popen[bytes]:
    flags = ["--master-address=127.0.0.1", f"--master-port={port}", "--node-rank=1", "--ranks=1", "--log-level=error"]
    command = [sys.executable, "-m", "services.denoiser.ranks", *flags]
    return subprocess.Popen(command, env=os.environ | {"SAFELIGHT_RANK_SECRET": secret})


async def test_a_model_is_shared_by_two_machines_and_outlives_a_loss_on_the_other(
    start: StartDenoiser, tiny_sd15: Path, tmp_path: Path, port: int, node: subprocess.Popen[bytes]
) -> None:
    alone = {"name": "alone", "path": str(tiny_sd15)}
    tiny = {"name": "tiny", "path": str(tiny_sd15), "denoiser": {"parallelism": 2}}
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"models": [alone, tiny]}))
    denoiser = await start(
        manifest=str(manifest), nodes=2, master_address="127.0.0.1", master_port=port, rank_secret="the secret"
    )
    work = exact(denoise_request())
    work.model = "alone"
    expected = await denoiser.latents(work)
    work.model = "tiny"
    assert torch.equal(await denoiser.latents(work), expected)
    (struck,) = rank_processes(node.pid)
    os.kill(struck, signal.SIGKILL)
    assert isinstance(await denoiser.failure(work), ModelRestartingError)
    while denoiser.metric("safelight_ranks", model="tiny") != 2:  # noqa: ASYNC110  only the metric tells
        await asyncio.sleep(0.02)
    assert torch.equal(await denoiser.latents(work), expected)
    assert rank_processes(node.pid) != [struck]


def test_other_machines_need_an_address_and_a_secret() -> None:
    with pytest.raises(SettingsError, match="nodes: 2 machines need a master_address and a rank_secret"):
        DenoiserSettings(nodes=2, master_address="10.0.0.1")
