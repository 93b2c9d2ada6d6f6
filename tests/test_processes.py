"""The four services as processes of their own, over TCP, as a deployment runs them; and what becomes of a request when
one of them is killed, frozen or stopped in the middle."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from bench.server_process import ServerProcess
from safelight import Client, GeneratedImage, GenerationOptions, GenerationResult, Progress

STEPS = 120
CHECKPOINT_STEPS = 3
OPTIONS = GenerationOptions(prompt="a cat", steps=STEPS, seed=1, determinism="exact")
# Generous: it only ends a hang.
LIMIT_SECONDS = 60.0
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Deployment:
    """The processes, and the undisturbed picture of OPTIONS."""

    encoder: ServerProcess
    denoisers: tuple[ServerProcess, ServerProcess]
    decoder: ServerProcess
    gateway: ServerProcess
    undisturbed: GeneratedImage

    @property
    def busy(self) -> ServerProcess:
        """The denoiser that has the request."""
        return next(denoiser for denoiser in self.denoisers if denoiser.total("safelight_running"))

    def start_again(self, denoiser: ServerProcess) -> None:
        """Bring a denoiser back; returns when the gateway sees both."""
        denoiser.start()
        denoiser.wait_until_serving()
        self.until(lambda: self.healthy_denoisers() == 2)

    def healthy_denoisers(self) -> float:
        """Denoisers that the gateway gives work to."""
        return self.gateway.total("safelight_replicas", stage="denoiser", healthy="true")

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the processes say so."""
        give_up = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < give_up
            time.sleep(0.02)


@pytest.fixture(scope="module")
def deployment(tiny_manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    with ExitStack() as stack:

        def start(name: str, module: str, *flags: str) -> ServerProcess:
            server = ServerProcess(module, folder / f"{name}.log", "--drain-seconds=20", *flags)
            stack.callback(server.kill)
            server.start()
            return server

        encoder, *denoisers, decoder = [
            start(name, f"services.{stage}", f"--manifest={tiny_manifest}", "--device=cpu", "--threads=1")
            for name, stage in (("e", "encoder"), ("d1", "denoiser"), ("d2", "denoiser"), ("v", "decoder"))
        ]
        for server in (encoder, *denoisers, decoder):
            server.wait_until_serving()
        gateway = start(
            "g",
            "gateway",
            f"--encoders={encoder.address}",
            f"--denoisers={','.join(server.address for server in denoisers)}",
            f"--decoders={decoder.address}",
            f"--checkpoint-steps={CHECKPOINT_STEPS}",
        )
        gateway.wait_until_serving()
        with Client(gateway.address) as client:
            (undisturbed,) = run(client, lambda: None).images
        first, second = denoisers
        yield Deployment(encoder, (first, second), decoder, gateway, undisturbed)


def run(client: Client, at_step_twenty: Callable[[], None]) -> GenerationResult:
    """The result of OPTIONS; something happens in the middle, and no step is seen twice or missed."""
    steps = []
    for event in client.stream(OPTIONS):
        if isinstance(event, Progress) and event.stage == "denoiser":
            steps.append(event.step)
            if event.step == 20:
                at_step_twenty()
    assert steps == list(range(1, STEPS + 1))
    assert isinstance(event, GenerationResult)
    return event


def disturbed(deployment: Deployment, blow: Callable[[ServerProcess], None]) -> tuple[GeneratedImage, ServerProcess]:
    """The picture whose denoiser was struck in the middle, and that denoiser."""
    struck: list[ServerProcess] = []

    def strike() -> None:
        struck.append(deployment.busy)
        blow(struck[0])

    with Client(deployment.gateway.address) as client:
        (image,) = run(client, strike).images
    return image, struck[0]


def resumes(deployment: Deployment, reason: str) -> float:
    return deployment.gateway.total("safelight_resumes_total", reason=reason)


def test_after_a_kill_the_picture_is_the_same_and_few_steps_are_recomputed(deployment: Deployment) -> None:
    image, killed = disturbed(deployment, ServerProcess.kill)
    deployment.start_again(killed)
    assert image.data == deployment.undisturbed.data
    assert image.determinism == "exact"
    assert image.steps_recomputed <= CHECKPOINT_STEPS
    assert resumes(deployment, "death") == 1


def test_after_a_silent_freeze_the_picture_is_the_same_and_the_frozen_one_comes_back(deployment: Deployment) -> None:
    image, frozen = disturbed(deployment, ServerProcess.freeze)
    frozen.thaw()
    deployment.until(lambda: deployment.healthy_denoisers() == 2)
    assert image.data == deployment.undisturbed.data
    assert image.steps_recomputed <= CHECKPOINT_STEPS
    assert resumes(deployment, "silence") == 1
    deployment.until(lambda: not frozen.total("safelight_running"))


def test_sigterm_hands_the_picture_on_without_recomputing_a_step_and_ends_with_0(deployment: Deployment) -> None:
    image, stopped = disturbed(deployment, lambda server: server.process.send_signal(signal.SIGTERM))
    assert stopped.process.wait(LIMIT_SECONDS) == 0
    deployment.start_again(stopped)
    assert image.data == deployment.undisturbed.data
    assert image.steps_recomputed == 0
    assert resumes(deployment, "drain") == 1
    assert [stage.stage for stage in image.stages] == ["encoder", "denoiser", "denoiser", "decoder"]


def test_every_process_shows_its_metrics_and_ends_with_0_after_sigterm(deployment: Deployment) -> None:
    method = "safelight.v1.GenerationService/Generate"
    assert deployment.gateway.total("safelight_requests_total", method=method, code="OK") >= 1
    assert deployment.gateway.total("safelight_checkpoint_bytes") == 0
    assert deployment.decoder.total("safelight_tensor_bytes_total", path="inline") > 0
    servers = [deployment.gateway, deployment.encoder, *deployment.denoisers, deployment.decoder]
    assert [server.stop(LIMIT_SECONDS) for server in servers] == [0] * 5
