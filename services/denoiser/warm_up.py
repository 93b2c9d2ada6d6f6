"""What steps cost before the first request comes: a few are measured at start-up, within a bound of time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch

from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.cost_curve import StepCosts
from services.denoiser.engine import DenoiserEngine
from services.denoiser.job import DenoiseJob
from services.denoiser.keyframes import Keyframes
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.planning import plan_sampling

# The probe's latent is so many times narrower and lower than the usual one, where that leaves enough to normalise.
_PROBE_RATIO, _MIN_PROBE_SIDE = 8, 4


def warm_up(
    engine: DenoiserEngine,
    models: Mapping[str, ModelDescription],
    costs: StepCosts,
    *,
    steps: int,
    seconds: float,
    max_rows: int,
) -> None:
    """Measure steps of every model at its default size, in batches of 1, 2, 4, ... rows; runs on the device's thread.

    A model gets an equal part of the time. What would not fit into it is left to be learnt while serving.

    Args:
        engine: runs the steps.
        models: what it serves.
        costs: takes the measurements.
        steps: measured for each size of a batch, at most; one more, the first, does not count.
        seconds: bound of all.
        max_rows: the largest batch.
    """
    for name, description in models.items():
        until = time.perf_counter() + seconds / len(models)
        denoiser = description.denoiser
        frames = [denoiser.default_latent_frames] if denoiser.default_latent_frames else []
        shape = (denoiser.latent_channels, *frames, denoiser.default_latent_height, denoiser.default_latent_width)
        expected = _probe(engine, name, denoiser, shape)
        rows = 1
        while rows <= max_rows and time.perf_counter() + 2 * expected <= until:
            jobs = [_job(engine, name, denoiser, shape, 1 + steps) for _ in range(rows)]
            measured = _measure(engine, jobs, steps, until)
            _record(costs, engine, jobs, measured)
            expected, rows = 2 * statistics.median(measured), 2 * rows


def _probe(engine: DenoiserEngine, name: str, denoiser: DenoiserDescription, shape: tuple[int, ...]) -> float:
    """A guess at the seconds of a step, from a much smaller one, which also wakes the device's libraries up.

    The truth lies between the small step's time, where launching kernels is what takes time, and the ratio of the areas
    as much, where computing does; the guess is their geometric mean. A film has so many tokens that attention, which
    grows with their square, makes up for the small step's launches: the ratio itself, against a step of one frame.
    """
    multiple = max(denoiser.latent_multiple, 1)
    channels, *frames, height, width = shape
    sides = (max(side // _PROBE_RATIO, min(_MIN_PROBE_SIDE, side)) for side in (height, width))
    small = (channels, *(1 for _ in frames), *(multiple * math.ceil(side / multiple) for side in sides))
    job = _job(engine, name, denoiser, small, steps=2)
    _, seconds = [_step_seconds(engine, [job]) for _ in range(2)]
    ratio = math.prod(shape) / math.prod(small)
    return seconds * (ratio if frames else math.sqrt(ratio))


def _measure(engine: DenoiserEngine, jobs: list[DenoiseJob], steps: int, until: float) -> list[float]:
    """Seconds of as many steps as time is left for; of the first, which else does not count, if for no other."""
    first = _step_seconds(engine, jobs)
    measured: list[float] = []
    while len(measured) < steps and time.perf_counter() + first <= until:
        measured.append(_step_seconds(engine, jobs))
    return measured or [first]


def _job(
    engine: DenoiserEngine, name: str, denoiser: DenoiserDescription, shape: tuple[int, ...], steps: int
) -> DenoiseJob:
    """A request without guidance, as long as it takes."""
    model = engine.models[name]
    plan = plan_sampling(model.sampling, latent_shape=shape, steps=steps)
    noise = NoiseSource(0, (1, *shape))
    keyframes = Keyframes(torch.zeros(1, *shape), (0,)) if denoiser.max_keyframes else None
    prompt = PromptConditioning(model.example_conditioning(), "warm-up", shape, keyframes=keyframes)
    return DenoiseJob(
        model=name,
        plan=plan,
        noise=noise,
        state=engine.start(name, plan, noise),
        guidance_scale=1.0,
        positive=engine.prepare(name, prompt),
        negative=None,
    )


def _step_seconds(engine: DenoiserEngine, jobs: list[DenoiseJob]) -> float:
    started = time.perf_counter()
    engine.step(jobs)
    return time.perf_counter() - started


def _record(costs: StepCosts, engine: DenoiserEngine, jobs: list[DenoiseJob], measured: list[float]) -> None:
    """The fastest counts: other processes of the machine start at the same time, and company only slows a step.

    One row alone is what a row of the exact class costs, too.
    """
    key, fastest = engine.batch_key(jobs[0]), min(measured)
    for _ in measured:
        costs.record(key, len(jobs), fastest)
        if len(jobs) == 1:
            costs.record(key._replace(exact=True), 1, fastest)
