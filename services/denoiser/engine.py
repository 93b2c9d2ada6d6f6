"""One step of a batch of requests on the device. Knows models and samplers; knows no gRPC and no event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from services.denoiser.guidance import classifier_free_guidance
from services.denoiser.job import DenoiseJob
from services.denoiser.registry import Denoiser
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.prediction import denoised_from_epsilon, scale_model_input
from services.denoiser.sampling.sampler import SamplingPlan, advance, initial_state
from services.denoiser.sampling.state import SamplerState


class DenoiserEngine:
    """Runs steps; called from the device's thread only.

    Args:
        models: the loaded models by name.
        batch_cfg: run a request's positive and negative rows in one forward pass.
    """

    def __init__(self, models: Mapping[str, Denoiser], batch_cfg: bool) -> None:
        self.models = models
        self._batch_cfg = batch_cfg

    @torch.inference_mode()
    def prepare(self, model: str, conditioning: Mapping[str, Tensor], field: str) -> Any:
        """What the model computes once a request from its conditioning."""
        return self.models[model].prepare(conditioning, field)

    @torch.inference_mode()
    def start(self, model: str, plan: SamplingPlan, noise: NoiseSource) -> SamplerState:
        """The state before the first step: pure noise at the plan's first sigma."""
        return initial_state(plan, noise.draw(0).to(self.models[model].device))

    @torch.inference_mode()
    def step(self, jobs: Sequence[DenoiseJob]) -> None:
        """Advance every job by one step in shared forward passes; all are of one model and latent shape."""
        model = self.models[jobs[0].model]
        guided = [job for job in jobs if job.negative is not None]
        positive, negative = self._predict(model, jobs, guided)
        negatives = dict(zip(guided, negative, strict=True))
        for job, epsilon in zip(jobs, positive, strict=True):
            if job in negatives:
                epsilon = classifier_free_guidance(epsilon, negatives[job], job.guidance_scale)
            self._advance(job, epsilon)

    def _predict(
        self, model: Denoiser, jobs: Sequence[DenoiseJob], guided: Sequence[DenoiseJob]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Epsilon [1, C, ...] of each job's prompt, and of each guided job's negative prompt."""
        rows = [(job, job.positive) for job in jobs]
        negative_rows = [(job, job.negative) for job in guided]
        if not negative_rows:
            return _forward(model, rows), ()
        if not self._batch_cfg:
            return _forward(model, rows), _forward(model, negative_rows)
        both = _forward(model, list(chain(rows, negative_rows)))
        return both[: len(rows)], both[len(rows) :]

    @staticmethod
    def _advance(job: DenoiseJob, epsilon: Tensor) -> None:
        sigma = job.plan.sigmas[job.state.step_index]
        denoised = denoised_from_epsilon(job.state.latents, epsilon, sigma)
        job.state = advance(job.plan, job.state, denoised, job.noise)


def _forward(model: Denoiser, rows: Sequence[tuple[DenoiseJob, Any]]) -> tuple[Tensor, ...]:
    """One forward pass of (job, conditioning) rows; epsilon of each, with a batch axis of 1."""
    latents = torch.cat([_model_input(job) for job, _ in rows])
    timesteps = torch.tensor([job.plan.timesteps[job.state.step_index] for job, _ in rows], device=latents.device)
    return torch.split(model.predict(latents, timesteps, [conditioning for _, conditioning in rows]), 1)


def _model_input(job: DenoiseJob) -> Tensor:
    return scale_model_input(job.state.latents, job.plan.sigmas[job.state.step_index])
