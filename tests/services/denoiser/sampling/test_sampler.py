"""Laws of all samplers on all schedules, on a variance-preserving model and on a rectified flow."""

from math import sqrt
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.denoiser.sampling.euler_ancestral import ancestral_sigmas
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.noise import NoiseSource
from services.denoiser.sampling.noise_process import noised
from services.denoiser.sampling.plan import SamplingPlan
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.sampler import SAMPLERS, advance, calls_left, initial_state, is_done
from services.denoiser.sampling.state import SamplerState, state_from_bytes, state_to_bytes
from tests.support.model_samplings import FLOW, STABLE_DIFFUSION

SEED, STEPS = 3, 6
IMAGE, VIDEO = (1, 4, 8, 8), (1, 16, 3, 4, 4)
Case: TypeAlias = tuple[ModelSampling, str]

CASES: list[Case] = [(model, sampler) for model in (STABLE_DIFFUSION, FLOW) for sampler in model.samplers]
NAMES = [f"{type(model.noise).__name__}-{sampler}" for model, sampler in CASES]
every_sampler = pytest.mark.parametrize("case", CASES, ids=NAMES)


def plan_for(case: Case, schedule: str = "", shape: tuple[int, ...] = IMAGE, steps: int = STEPS) -> SamplingPlan:
    """The model's first schedule; eta 0.7 where the sampler has one."""
    model, sampler = case
    parameters = dict.fromkeys(SAMPLERS[sampler].parameters, 0.7)
    return plan_sampling(
        model, latent_shape=shape[1:], sampler=sampler, schedule=schedule, steps=steps, sampler_parameters=parameters
    )


def denoise(x: Tensor, sigma: float) -> Tensor:
    """A nonlinear stand-in for the denoiser, [1, C, ...] -> the same shape."""
    return torch.tanh(x / (1 + sigma)) + 0.1 * torch.cos(3 * x)


def start(case: Case, plan: SamplingPlan, shape: tuple[int, ...] = IMAGE) -> SamplerState:
    return initial_state(case[0].noise.pure_noise(NoiseSource(SEED, shape).draw(0), plan.sigmas[0]))


def call(plan: SamplingPlan, state: SamplerState, source: NoiseSource) -> SamplerState:
    return advance(plan, state, denoise(state.latents, plan.sigmas[state.level]), source)


def states(plan: SamplingPlan, state: SamplerState, source: NoiseSource) -> list[SamplerState]:
    """The state and all that follow it, one a model call."""
    found = [state]
    while not is_done(plan, found[-1]):
        found.append(call(plan, found[-1], source))
    return found


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@every_sampler
def test_a_request_resumed_elsewhere_after_any_call_ends_bit_for_bit_the_same(
    case: Case, shape: tuple[int, ...]
) -> None:
    plan = plan_for(case, shape=shape)
    passed = states(plan, start(case, plan, shape), NoiseSource(SEED, shape))
    for state in passed:
        resumed = states(plan, state_from_bytes(state_to_bytes(state)), NoiseSource(SEED, shape))[-1]
        assert torch.equal(resumed.latents, passed[-1].latents)
        assert state_to_bytes(resumed) == state_to_bytes(passed[-1])


@every_sampler
def test_every_schedule_ends_finite_and_free_of_noise(case: Case) -> None:
    for schedule in case[0].schedules:
        for steps in (1, 2, 3, 20):
            plan = plan_for(case, schedule, steps=steps)
            assert (np.diff(plan.sigmas) < 0).all()
            assert plan.sigmas[-1] == 0
            last = states(plan, start(case, plan), NoiseSource(SEED, IMAGE))[-1]
            assert bool(last.latents.isfinite().all()), (schedule, steps)
            assert last.step_index == steps


@every_sampler
def test_a_sampler_keeps_as_much_as_it_says(case: Case) -> None:
    plan, sampler = plan_for(case), SAMPLERS[case[1]]
    for state in states(plan, start(case, plan), NoiseSource(SEED, IMAGE))[:-1]:
        assert len(state.history) == sampler.history_length(state) <= sampler.longest_history


@every_sampler
def test_the_calls_that_are_left_are_counted(case: Case) -> None:
    plan = plan_for(case)
    passed = states(plan, start(case, plan), NoiseSource(SEED, IMAGE))
    assert [calls_left(plan, state) for state in passed] == list(reversed(range(len(passed))))
    assert len(passed) - 1 == STEPS * SAMPLERS[case[1]].calls_per_step - (SAMPLERS[case[1]].calls_per_step - 1)


@every_sampler
def test_advance_leaves_the_state_it_was_given(case: Case) -> None:
    plan, source = plan_for(case), NoiseSource(SEED, IMAGE)
    state = states(plan, start(case, plan), source)[2]
    before = state_to_bytes(state)
    states(plan, state, source)
    assert state_to_bytes(state) == before


@every_sampler
def test_the_last_step_returns_the_denoised_latents(case: Case) -> None:
    plan, source = plan_for(case), NoiseSource(SEED, IMAGE)
    *_, state, last = states(plan, start(case, plan), source)
    assert torch.equal(last.latents, denoise(state.latents, plan.sigmas[-2]))


@every_sampler
def test_a_perfect_denoiser_is_never_left(case: Case) -> None:
    """If the model always knows x0, every sampler stays at alpha x0 + sigma (unit variance) and ends at x0."""
    clean = torch.linspace(-1, 1, 256).reshape(IMAGE)
    plan, source = plan_for(case), NoiseSource(SEED, IMAGE)
    state = initial_state(noised(case[0].noise, clean, source.draw(0), plan.sigmas[0]))
    while not is_done(plan, state):
        noise = state.latents - plan.alphas[state.level] * clean
        assert noise.std().item() == pytest.approx(plan.sigmas[state.level], rel=0.25)
        state = advance(plan, state, clean, source)
    assert torch.equal(state.latents, clean)


@every_sampler
def test_noise_is_drawn_only_by_steps_that_add_some(case: Case) -> None:
    stochastic = {"euler_ancestral", "ddim", "ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"}
    plan = plan_for(case)
    last = states(plan, start(case, plan), NoiseSource(SEED, IMAGE))[-1]
    assert last.noise_draws == (STEPS if case[1] in stochastic else 1)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddim", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_without_eta_nothing_is_drawn(sampler: str) -> None:
    plan = plan_sampling(
        STABLE_DIFFUSION, latent_shape=IMAGE[1:], steps=STEPS, sampler=sampler, sampler_parameters={"eta": 0.0}
    )
    assert states(plan, start((STABLE_DIFFUSION, sampler), plan), NoiseSource(SEED, IMAGE))[-1].noise_draws == 1


@pytest.mark.parametrize(
    ("sampler", "eta", "same_as", "its_eta"),
    [
        ("ddim", 0.7, "euler_ancestral", 0.7),
        ("ddim", 1.0, "ddpm", None),
        ("ddim", 0.0, "euler", None),
        ("dpmpp_2m_sde", 0.0, "dpmpp_2m", None),
    ],
)
def test_samplers_coincide_at_an_eta(sampler: str, eta: float, same_as: str, its_eta: float | None) -> None:
    def last(name: str, value: float | None) -> Tensor:
        plan = plan_sampling(
            STABLE_DIFFUSION,
            latent_shape=IMAGE[1:],
            steps=STEPS,
            sampler=name,
            schedule="karras",
            sampler_parameters={} if value is None else {"eta": value},
        )
        return states(plan, start((STABLE_DIFFUSION, name), plan), NoiseSource(SEED, IMAGE))[-1].latents

    torch.testing.assert_close(last(sampler, eta), last(same_as, its_eta), rtol=1e-4, atol=1e-5)


@given(eta=st.floats(0, 1), sigma_next=st.floats(0, 14), gap=st.floats(1e-9, 1e3))
def test_ancestral_variances_add_up_to_the_next_noise_level(eta: float, sigma_next: float, gap: float) -> None:
    sigma_down, sigma_up = ancestral_sigmas(sigma_next + gap, sigma_next, eta)
    assert sigma_down**2 + sigma_up**2 == pytest.approx(sigma_next**2)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "deis", "unipc", "dpmpp_3m_sde"])
def test_higher_order_beats_first_order(sampler: str) -> None:
    """For data ~ N(0, 1) the exact denoiser is x / (1 + sigma^2); the ODE ends at x_max / sqrt(1 + sigma_max^2)."""

    def error(name: str) -> float:
        plan = plan_sampling(
            STABLE_DIFFUSION,
            latent_shape=IMAGE[1:],
            sampler=name,
            schedule="exponential",
            steps=20,
            sampler_parameters=dict.fromkeys(SAMPLERS[name].parameters, 0.0),
        )
        noise, source = NoiseSource(SEED, IMAGE).draw(0), NoiseSource(SEED, IMAGE)
        state = initial_state(plan.sigmas[0] * noise)
        while not is_done(plan, state):
            state = advance(plan, state, state.latents / (1 + plan.sigmas[state.level] ** 2), source)
        exact = noise * plan.sigmas[0] / sqrt(1 + plan.sigmas[0] ** 2)
        return float((state.latents - exact).norm() / exact.norm())

    assert error(sampler) < error("euler") / 5


def test_a_finished_state_cannot_advance() -> None:
    case = STABLE_DIFFUSION, "euler"
    plan, source = plan_for(case), NoiseSource(SEED, IMAGE)
    state = states(plan, start(case, plan), source)[-1]
    with pytest.raises(ValueError, match="all 6 steps are done"):
        advance(plan, state, state.latents, source)


@pytest.mark.parametrize("data", [b"", b"not safetensors", state_to_bytes(SamplerState(torch.ones(1), 0, (), 1))[:-3]])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a serialised sampler state"):
        state_from_bytes(data)


def test_bytes_keep_every_bit_even_of_a_view_of_a_batch() -> None:
    batch = torch.tensor([[0.0, 1.0], [-0.0, float("nan")], [float("inf"), 1e-45]])
    state = SamplerState(batch[1:2], 2, (batch[2:3], batch[0:1]), 5, 1)
    back = state_from_bytes(state_to_bytes(state))
    pairs = zip((back.latents, *back.history), (batch[1:2], batch[2:3], batch[0:1]), strict=True)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    assert (back.step_index, back.noise_draws, back.calls) == (2, 5, 1)
