"""What the split costs: pictures through the four services against the same modules called directly in one process.

    python -m bench.split_overhead                       # the demo model
    python -m bench.split_overhead --real-width          # SD1.5's sizes, random weights, 512x512, bfloat16

The two take turns. The direct side has no gRPC, no event loop, no lease: it calls encoder, denoising engine, decoder
and the PNG writer one after the other. The split side is the embedded stack in a child process, through the client.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.real_width import save_real_width_sd15
from safelight import Client, EmbeddedStack
from safelight.v1.work_pb2 import GenerationParameters, OutputOptions
from services.common.manifest import DEMO_MODEL_PATH, Component, ModelEntry
from services.decoder.images import to_pixels
from services.decoder.models.sd15 import load_sd15 as load_sd15_decoder
from services.decoder.output_files import picture_file
from services.decoder.tiling import DEFAULT_TILING
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob
from services.denoiser.models.sd15 import load_sd15
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.planning import plan_sampling
from services.encoder.models.sd15 import SD15Encoder

Conditioning = Mapping[str, torch.Tensor]

PROMPT = "a cat"
GUIDANCE_SCALE = 4.0


@dataclass(frozen=True)
class Case:
    """What is drawn."""

    entry: ModelEntry
    size: int
    steps: int


@dataclass(frozen=True)
class Report:
    """Seconds a picture, all rounds, and the median of the pairwise ratios."""

    direct_seconds: list[float]
    split_seconds: list[float]
    median_overhead_ms: float
    median_ratio: float


class DirectPipeline:
    """The modules of the stages, called in this process."""

    def __init__(self, case: Case) -> None:
        cpu = torch.device("cpu")
        self._case = case
        self._encoder = SD15Encoder.load(case.entry, cpu)
        self._engine = DenoiserEngine({"model": load_sd15(case.entry, cpu)}, batch_cfg=True)
        self._decoder = load_sd15_decoder(case.entry, cpu)

    def draw(self, seed: int) -> bytes:
        """A PNG."""
        prompts = [self._encoder.tokenize(prompt) for prompt in (PROMPT, "")]
        positive, negative = self._encoder.encode(prompts, clip_skip=1)
        job = self._start(seed, positive, negative)
        for _ in range(job.steps):
            self._engine.step([job])
        image = self._decoder.decode(job.state.latents, DEFAULT_TILING)
        return picture_file(to_pixels(image[0]), OutputOptions(), GenerationParameters()).content.read()

    def _start(self, seed: int, positive: Conditioning, negative: Conditioning) -> DenoiseJob:
        shape = (4, self._case.size // 8, self._case.size // 8)
        plan = plan_sampling(self._engine.models["model"].sampling, latent_shape=shape, steps=self._case.steps)
        noise = NoiseSource(seed, (1, *shape))
        return DenoiseJob(
            model="model",
            plan=plan,
            noise=noise,
            state=self._engine.start("model", plan, noise),
            guidance_scale=GUIDANCE_SCALE,
            positive=self._engine.prepare("model", PromptConditioning(positive, "positive", shape)),
            negative=self._engine.prepare("model", PromptConditioning(negative, "negative", shape)),
            deadline=None,
        )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> Report:
    """Direct and split in turns; the first round of each warms up and is not counted."""
    stage = {"dtype": case.entry.denoiser.dtype}
    entry = {"name": "model", "path": case.entry.path, "encoder": stage, "denoiser": stage, "decoder": stage}
    direct_pipeline = DirectPipeline(case)
    options: dict[str, Any] = {
        "steps": case.steps,
        "width": case.size,
        "height": case.size,
        "guidance_scale": GUIDANCE_SCALE,
    }
    direct, split = [], []
    with EmbeddedStack((entry,)) as stack, Client(stack.endpoint) as client:
        for seed in range(rounds + 1):
            direct.append(seconds(partial(direct_pipeline.draw, seed)))
            split.append(seconds(partial(client.generate, PROMPT, seed=seed, **options)))
    pairs = list(zip(direct, split, strict=True))[1:]
    return Report(
        direct_seconds=[a for a, _ in pairs],
        split_seconds=[b for _, b in pairs],
        median_overhead_ms=statistics.median((b - a) * 1000 for a, b in pairs),
        median_ratio=statistics.median(b / a for a, b in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-width", action="store_true", help="SD1.5's sizes with random weights, in bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side; 512 with --real-width")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.real_width:
            part = Component(dtype="bfloat16")
            path = str(save_real_width_sd15(Path(folder), torch.bfloat16))
            entry = ModelEntry(name="model", path=path, encoder=part, denoiser=part, decoder=part)
            case = Case(entry, size=512, steps=arguments.steps)
        else:
            case = Case(ModelEntry(name="model", path=str(DEMO_MODEL_PATH)), arguments.size, arguments.steps)
        report = measure(case, arguments.rounds)
    sys.stdout.write(_text(report, as_json=arguments.json) + "\n")


def _text(report: Report, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(report))
    direct, split = statistics.median(report.direct_seconds), statistics.median(report.split_seconds)
    return (
        f"direct {direct:.3f} s, split {split:.3f} s a picture (medians of {len(report.direct_seconds)}); "
        f"overhead {report.median_overhead_ms:.1f} ms, ratio {report.median_ratio:.4f} (medians of the pairs)"
    )


if __name__ == "__main__":
    main()
