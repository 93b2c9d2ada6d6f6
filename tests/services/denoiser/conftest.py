"""What the denoiser's tests share."""

from __future__ import annotations

from typing import Any

import pytest

from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from tests.serving import StartStage
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser


@pytest.fixture
def start(start_stage: StartStage, tiny_manifest: str) -> StartDenoiser:
    """Starts denoisers with the tiny model, without a warm-up."""

    async def start_denoiser(**settings: Any) -> RunningDenoiser:
        usual: dict[str, Any] = {"manifest": tiny_manifest, "device": "cpu", "warm_up_steps": 0}
        running = await start_stage(DenoiserSettings(**usual | settings), build_denoiser)
        return RunningDenoiser(running.server, running.channel)

    return start_denoiser
