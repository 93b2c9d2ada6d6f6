"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest

from services.common.channels import open_channel
from services.common.metrics import Metrics
from services.common.server import Server, Service
from services.common.settings import ServerSettings, StageSettings
from services.common.stage import make_surroundings
from tests.serving import AT_ONCE, BuildStage, Running, Serve, StartStage

# The machine may be shared: how long an example takes says nothing.
hypothesis.settings.register_profile("safelight", deadline=None)
hypothesis.settings.load_profile("safelight")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tests compute on tiny tensors: more threads only wait for each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts services; see `tests.serving.Serve`."""
    async with AsyncExitStack() as stack:

        async def start(service: Service, settings: ServerSettings = AT_ONCE) -> Running:
            server = Server(service, settings, Metrics())
            await server.start()
            stack.push_async_callback(server.stop)
            channel = open_channel(server.address)
            stack.push_async_callback(channel.close)
            return Running(server, channel)

        yield start


@pytest.fixture
async def start_stage() -> AsyncIterator[StartStage]:
    """Starts stages as their own processes would; see `tests.serving.StartStage`."""
    async with AsyncExitStack() as stack:

        async def start(settings: StageSettings, build: BuildStage) -> Running:
            surroundings = make_surroundings(settings)
            server = Server(build(settings, surroundings), replace(settings, drain_seconds=0.0), surroundings.metrics)
            await server.start()
            stack.push_async_callback(server.stop)
            channel = open_channel(server.address)
            stack.push_async_callback(channel.close)
            return Running(server, channel)

        yield start


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 of a few thousand random weights, in the diffusers layout."""
    from tests.support.tiny_sd15 import save_tiny_sd15  # diffusers is slow to import, and few tests need it

    return save_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_manifest(tiny_sd15: Path) -> str:
    """A manifest with that model, named "tiny"."""
    path = tiny_sd15.parent / "manifest.yaml"
    path.write_text(f"models:\n  - {{name: tiny, path: {tiny_sd15}}}\n")
    return str(path)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1-dev of a few thousand random weights, in the diffusers layout."""
    from tests.support.tiny_flux import save_tiny_flux  # as above

    return save_tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux")
