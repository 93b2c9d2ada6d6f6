"""One model call of a batch of requests on the device. Knows models and samplers; knows no gRPC and no event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from services.denoiser.conditioning import PromptConditioning
from services.denoiser.guidance import classifier_free_guidance
from services.denoiser.job import BatchKey, DenoiseJob
from services.denoiser.registry import Denoiser
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.noise_process import NoiseProcess, noised
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.sampler import advance, initial_state
from services.denoiser.sampling.state import SamplerState, state_on
from services.modeling.lora.adapter import Applied

Row: TypeAlias = tuple[DenoiseJob, Any]
"""A request and one of its conditionings: a row of a forward pass."""

_HOST = torch.device("cpu")


class DenoiserEngine:
    """Runs steps; called from the device's thread only.

    Args:
        models: the loaded models by name.
        batch_cfg: run a request's positive and negative rows in one forward pass.
        max_fused_bytes: that a set of adapters within a model's weights may take.
    """

    def __init__(self, models: Mapping[str, Denoiser], batch_cfg: bool, max_fused_bytes: int = 0) -> None:
        self.models = models
        self._batch_cfg = batch_cfg
        self._max_fused_bytes = max_fused_bytes

    def batch_key(self, job: DenoiseJob) -> BatchKey:
        """Which requests can share its forward passes."""
        conditioning = self.models[job.model].batch_key(job.positive)
        return BatchKey(job.model, tuple(job.state.latents.shape[1:]), conditioning, job.exact)

    @torch.inference_mode()
    def prepare(self, model: str, conditioning: PromptConditioning, adapters: tuple[Applied, ...] = ()) -> Any:
        """What the model computes once a request from its conditioning."""
        with self.models[model].network.with_branches([adapters]):
            return self.models[model].prepare(conditioning)

    @torch.inference_mode()
    def start(self, model: str, plan: SamplingPlan, noise: NoiseSource, picture: Tensor | None = None) -> SamplerState:
        """The state before the first step: a picture's latent, or nothing, noised to the plan's first sigma."""
        process, device = self.models[model].sampling.noise, self.models[model].device
        first, sigma = noise.draw(0).to(device), plan.sigmas[0]
        if picture is None:
            return initial_state(process.pure_noise(first, sigma))
        return initial_state(noised(process, picture.to(device), first, sigma))

    @torch.inference_mode()
    def step(self, jobs: Sequence[DenoiseJob]) -> None:
        """Advance every job by one model call in shared forward passes; all are of one batch key.

        A job of the exact class comes alone. Returns when the device is done.
        """
        model = self.models[jobs[0].model]
        for job in jobs:
            self._place(job, model.device)
        guided = [job for job in jobs if job.negative is not None]
        positive, negative = self._predict(model, jobs, guided)
        negatives = dict(zip(guided, negative, strict=True))
        for job, prediction in zip(jobs, positive, strict=True):
            if job in negatives:
                prediction = classifier_free_guidance(prediction, negatives[job], job.guidance_scale)
            _advance(model.sampling.noise, job, prediction)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    @torch.inference_mode()
    def spill(self, jobs: Sequence[DenoiseJob]) -> int:
        """Move what the jobs hold on the device to host memory until their next step; returns how many had to move."""
        return sum(self._place(job, _HOST) for job in jobs)

    def _place(self, job: DenoiseJob, device: torch.device) -> bool:
        """Whether anything had to move."""
        if job.state.latents.device == device:
            return False
        model = self.models[job.model]
        job.state = state_on(job.state, device)
        job.positive = model.move(job.positive, device)
        job.negative = None if job.negative is None else model.move(job.negative, device)
        job.inpainting = job.inpainting and job.inpainting.to(device)
        return True

    def _predict(
        self, model: Denoiser, jobs: Sequence[DenoiseJob], guided: Sequence[DenoiseJob]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Predictions [1, C, ...] for each job's prompt, and for each guided job's negative prompt."""
        positive = [(job, job.positive) for job in jobs]
        negative = [(job, job.negative) for job in guided]
        passes = self._passes(positive, negative, model.row_groups)
        predicted = [row for rows in passes for row in self._forward(model, rows)]
        return predicted[: len(jobs)], predicted[len(jobs) :]

    def _passes(self, positive: list[Row], negative: list[Row], row_groups: int) -> list[list[Row]]:
        """The rows of each forward pass. In the exact class every row is computed apart: a row's rounding follows the
        size of its batch."""
        rows = positive + negative
        if positive[0][0].exact:
            return [rows[first : first + row_groups] for first in range(0, len(rows), row_groups)]
        if not negative or self._batch_cfg or row_groups > 1:
            return [positive + negative]
        return [positive, negative]

    def _forward(self, model: Denoiser, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """One forward pass; the prediction for each row, with a batch axis of 1."""
        latents = torch.cat([model.sampling.noise.model_input(job.state.latents, _sigma(job)) for job, _ in rows])
        timesteps = torch.tensor([job.plan.timesteps[job.state.level] for job, _ in rows], device=latents.device)
        with self._adapted(model, [job for job, _ in rows]):
            return torch.split(model.predict(latents, timesteps, [conditioning for _, conditioning in rows]), 1)

    def _adapted(self, model: Denoiser, jobs: Sequence[DenoiseJob]) -> AbstractContextManager[None]:
        """Each row with its job's adapters; in the exact class never fused, which hangs on what else was asked for."""
        adapters = [job.adapters for job in jobs]
        if jobs[0].exact:
            return model.network.with_branches(adapters)
        return model.network.with_adapters(adapters, self._max_fused_bytes)


def _advance(process: NoiseProcess, job: DenoiseJob, prediction: Tensor) -> None:
    denoised = process.denoised(job.state.latents, prediction, _sigma(job))
    if job.inpainting is not None:
        denoised = job.inpainting.blend(denoised)
    job.state = advance(job.plan, job.state, denoised, job.noise)
    job.denoised = denoised if not job.state.calls and job.preview_due(job.state.step_index) else None


def _sigma(job: DenoiseJob) -> float:
    """The noise level of its latents."""
    return job.plan.sigmas[job.state.level]
