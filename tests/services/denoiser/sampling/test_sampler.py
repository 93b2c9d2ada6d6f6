import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.denoiser.sampling.ddim import ddim_step
from services.denoiser.sampling.euler_ancestral import ancestral_sigmas, euler_ancestral_step
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import (
    SAMPLERS,
    advance,
    initial_state,
    is_done,
)
from services.denoiser.sampling.state import SamplerState, state_from_bytes, state_to_bytes
from tests.support.model_samplings import STABLE_DIFFUSION

SEED, STEPS = 3, 6
IMAGE, VIDEO = (1, 4, 8, 8), (1, 16, 3, 4, 4)


def plan_for(sampler: str) -> SamplingPlan:
    """Six steps; eta 0.7 where the sampler has one."""
    parameters = dict.fromkeys(SAMPLERS[sampler].parameters, 0.7)
    return plan_sampling(
        STABLE_DIFFUSION,
        latent_shape=IMAGE[1:],
        sampler=sampler,
        schedule="karras",
        steps=STEPS,
        sampler_parameters=parameters,
    )


def denoise(x: Tensor, sigma: float) -> Tensor:
    """A nonlinear stand-in for the denoiser, [1, C, ...] -> the same shape."""
    return torch.tanh(x / (1 + sigma)) + 0.1 * torch.cos(3 * x)


def run(plan: SamplingPlan, state: SamplerState, source: NoiseSource, until: int) -> SamplerState:
    while state.step_index < until:
        state = advance(plan, state, denoise(state.latents, plan.sigmas[state.step_index]), source)
    return state


def start(plan: SamplingPlan, shape: tuple[int, ...]) -> SamplerState:
    return initial_state(plan.sigmas[0] * NoiseSource(SEED, shape).draw(0))


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("sampler", STABLE_DIFFUSION.samplers)
@pytest.mark.parametrize("interrupted_at", range(STEPS + 1))
def test_a_request_resumed_elsewhere_ends_bit_for_bit_the_same(
    sampler: str, interrupted_at: int, shape: tuple[int, ...]
) -> None:
    plan, source = plan_for(sampler), NoiseSource(SEED, shape)
    halfway = run(plan, start(plan, shape), source, interrupted_at)
    data = state_to_bytes(halfway)
    expected = run(plan, halfway, source, STEPS)

    resumed = run(plan, state_from_bytes(data), NoiseSource(SEED, shape), STEPS)

    assert torch.equal(resumed.latents, expected.latents)
    assert state_to_bytes(resumed) == state_to_bytes(expected)


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION.samplers)
def test_advance_leaves_the_state_it_was_given(sampler: str) -> None:
    plan, source = plan_for(sampler), NoiseSource(SEED, IMAGE)
    state = run(plan, start(plan, IMAGE), source, 2)
    before = state_to_bytes(state)
    run(plan, state, source, STEPS)
    assert state_to_bytes(state) == before


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION.samplers)
def test_the_last_step_returns_the_denoised_latents(sampler: str) -> None:
    plan, source = plan_for(sampler), NoiseSource(SEED, IMAGE)
    state = run(plan, start(plan, IMAGE), source, STEPS - 1)
    denoised = denoise(state.latents, plan.sigmas[-2])
    assert torch.equal(advance(plan, state, denoised, source).latents, denoised)


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION.samplers)
def test_a_perfect_denoiser_is_never_left(sampler: str) -> None:
    """If the model always knows x0, every sampler stays at x0 + sigma * (unit variance) and ends at x0."""
    clean = torch.linspace(-1, 1, 256).reshape(IMAGE)
    plan, source = plan_for(sampler), NoiseSource(SEED, IMAGE)
    state = start(plan, IMAGE)
    state = SamplerState(state.latents + clean, 0, (), 1)
    while not is_done(plan, state):
        noise_level = (state.latents - clean).std().item()
        assert noise_level == pytest.approx(plan.sigmas[state.step_index], rel=0.25)
        state = advance(plan, state, clean, source)
    assert torch.equal(state.latents, clean)


@pytest.mark.parametrize(
    ("sampler", "draws"), [("euler", 1), ("dpmpp_2m", 1), ("ddim", STEPS), ("euler_ancestral", STEPS)]
)
def test_noise_is_drawn_only_by_steps_that_add_some(sampler: str, draws: int) -> None:
    plan = plan_for(sampler)
    assert run(plan, start(plan, IMAGE), NoiseSource(SEED, IMAGE), STEPS).noise_draws == draws


@given(eta=st.floats(0, 1), sigma_next=st.floats(0, 14), gap=st.floats(1e-3, 10))
def test_ddim_is_ancestral_euler_at_the_same_eta(eta: float, sigma_next: float, gap: float) -> None:
    x, denoised = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0)).unbind()
    ddim, ddim_deviation = ddim_step(x, denoised, sigma_next + gap, sigma_next, eta)
    ancestral, ancestral_deviation = euler_ancestral_step(x, denoised, sigma_next + gap, sigma_next, eta)
    assert ddim_deviation == ancestral_deviation
    torch.testing.assert_close(ddim, ancestral)


@given(eta=st.floats(0, 1), sigma_next=st.floats(0, 14), gap=st.floats(1e-9, 1e3))
def test_ancestral_variances_add_up_to_the_next_noise_level(eta: float, sigma_next: float, gap: float) -> None:
    sigma_down, sigma_up = ancestral_sigmas(sigma_next + gap, sigma_next, eta)
    assert sigma_down**2 + sigma_up**2 == pytest.approx(sigma_next**2)


def test_second_order_beats_first_order() -> None:
    """For data ~ N(0, 1) the exact denoiser is x / (1 + sigma^2); the ODE ends at x_max / sqrt(1 + sigma_max^2)."""

    def error(sampler: str) -> float:
        plan = plan_sampling(
            STABLE_DIFFUSION, latent_shape=IMAGE[1:], sampler=sampler, schedule="exponential", steps=20
        )
        noise, source = NoiseSource(SEED, IMAGE).draw(0), NoiseSource(SEED, IMAGE)
        state = initial_state(plan.sigmas[0] * noise)
        while not is_done(plan, state):
            sigma = plan.sigmas[state.step_index]
            state = advance(plan, state, state.latents / (1 + sigma**2), source)
        exact = noise * plan.sigmas[0] / (1 + plan.sigmas[0] ** 2) ** 0.5
        return float((state.latents - exact).norm() / exact.norm())

    assert error("dpmpp_2m") < error("euler") / 5


def test_a_finished_state_cannot_advance() -> None:
    plan, source = plan_for("euler"), NoiseSource(SEED, IMAGE)
    state = run(plan, start(plan, IMAGE), source, STEPS)
    with pytest.raises(ValueError, match="all 6 steps are done"):
        advance(plan, state, state.latents, source)


@pytest.mark.parametrize("data", [b"", b"not safetensors", state_to_bytes(SamplerState(torch.ones(1), 0, (), 1))[:-3]])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a serialised sampler state"):
        state_from_bytes(data)


def test_bytes_keep_every_bit_even_of_a_view_of_a_batch() -> None:
    batch = torch.tensor([[0.0, 1.0], [-0.0, float("nan")], [float("inf"), 1e-45]])
    state = SamplerState(batch[1:2], 2, (batch[2:3], batch[0:1]), 5)
    back = state_from_bytes(state_to_bytes(state))
    pairs = zip((back.latents, *back.history), (batch[1:2], batch[2:3], batch[0:1]), strict=True)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    assert (back.step_index, back.noise_draws) == (2, 5)
