from collections.abc import Mapping
from functools import partial
from math import inf
from typing import Any

import pytest

from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.schedules import flow, flow_dynamic, karras
from tests.support.model_samplings import FLOW, STABLE_DIFFUSION

IMAGE = (4, 64, 64)


def test_a_plan_pairs_each_sigma_with_the_timestep_it_was_trained_at() -> None:
    plan = plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, sampler="euler", schedule="scaled_linear", steps=4)
    assert plan.timesteps == pytest.approx((999, 666, 333, 0), abs=1e-9)
    assert len(plan.sigmas) == 5


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [
        ("euler", {}),
        ("dpmpp_2m", {}),
        ("ddim", {"eta": 0.0}),
        ("euler_ancestral", {"eta": 1.0}),
        ("dpmpp_2m_sde", {"eta": 1.0}),
        ("dpmpp_3m_sde", {"eta": 1.0}),
    ],
)
def test_each_sampler_has_the_defaults_of_the_field(sampler: str, parameters: Mapping[str, float]) -> None:
    assert (
        plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, sampler=sampler, schedule="karras", steps=4).parameters
        == parameters
    )


def test_given_parameters_reach_the_sampler_and_the_schedule() -> None:
    plan = plan_sampling(
        STABLE_DIFFUSION,
        latent_shape=IMAGE,
        sampler="ddim",
        sampler_parameters={"eta": 0.5},
        schedule="karras",
        schedule_parameters={"rho": 3.0},
        steps=4,
    )
    assert plan.parameters == {"eta": 0.5}
    assert plan.sigmas == tuple(karras(STABLE_DIFFUSION.noise, 4, 3.0))


def test_karras_takes_the_rho_of_the_paper_by_default() -> None:
    assert plan_sampling(
        STABLE_DIFFUSION, latent_shape=IMAGE, sampler="euler", schedule="karras", steps=4
    ).sigmas == tuple(karras(STABLE_DIFFUSION.noise, 4, 7.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "plms"}, "the model has no sampler 'plms'; choose from ddim, ddpm, deis, dpmpp_2m,"),
        ({"schedule": "cosine"}, "the model has no schedule 'cosine'; choose from ays, beta, ddim, exponential,"),
        ({"sampler": "flow_match_euler"}, "the model has no sampler 'flow_match_euler'"),
        ({"strength": 1.7}, r"strength is 1.7, must be in \[0, 1\]"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"sampler_parameters": {"eta": 0.5}}, "sampler 'euler' has no parameter 'eta'; it takes nothing"),
        ({"sampler": "ddim", "sampler_parameters": {"s_churn": 1.0}}, "no parameter 's_churn'; it takes eta"),
        ({"sampler": "ddim", "sampler_parameters": {"eta": 1.5}}, r"eta is 1.5, must be in \[0, 1\]"),
        ({"sampler": "ddim", "sampler_parameters": {"eta": float("nan")}}, "eta is nan"),
        ({"schedule_parameters": {"rho": 0.0}}, r"schedule 'karras': rho is 0.0, must be in \[1, 100\]"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"sampler": "euler", "schedule": "karras", "steps": 4}
    with pytest.raises(ValueError, match=message):
        plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, **(defaults | arguments))


def test_names_that_are_not_given_are_the_models_first_ones() -> None:
    assert plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, steps=4) == plan_sampling(
        STABLE_DIFFUSION, latent_shape=IMAGE, steps=4, sampler="euler", schedule="scaled_linear"
    )


def test_a_model_has_its_own_values_for_a_schedules_parameters_and_a_request_overrides_them() -> None:
    flow_of = partial(plan_sampling, FLOW, latent_shape=IMAGE, steps=4, schedule="flow")
    of_shift = partial(flow, 4, shift_terminal=0.0, sigma_max=1.0, sigma_min=0.0)
    assert flow_of().sigmas == tuple(of_shift(shift=3.0))
    assert flow_of(schedule_parameters={"shift": 2.0}).sigmas == tuple(of_shift(shift=2.0))


def test_dynamic_shift_counts_the_tokens_of_the_latent() -> None:
    plan = plan_sampling(FLOW, latent_shape=(16, 128, 96), steps=4, schedule="flow_dynamic")
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "base_tokens": 256, "max_tokens": 4096}
    expected = flow_dynamic(4, 64 * 48, **defaults, shift_terminal=0.0, sigma_max=1.0, sigma_min=0.0)
    assert plan.sigmas == tuple(expected)


def test_a_flow_has_less_of_the_picture_where_it_has_more_noise() -> None:
    plan = plan_sampling(FLOW, latent_shape=IMAGE, steps=4)
    assert plan.alphas == pytest.approx([1 - sigma for sigma in plan.sigmas])
    assert plan.timesteps == pytest.approx([1000 * sigma for sigma in plan.sigmas[:-1]])
    assert (plan.lambdas[0], plan.lambdas[-1]) == (-inf, inf)
    assert sorted(plan.lambdas) == list(plan.lambdas)


@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.8, 3), (0.5, 9), (0.0, 19)])
def test_a_picture_enters_where_the_peer_lets_it_enter(strength: float, start: int) -> None:
    whole = plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, steps=20)
    cut = plan_sampling(STABLE_DIFFUSION, latent_shape=IMAGE, steps=20, strength=strength)
    assert (cut.sigmas, cut.timesteps) == (whole.sigmas[start:], whole.timesteps[start:])


def test_parameters_that_make_no_falling_noise_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="its noise levels do not fall"):
        plan_sampling(
            FLOW,
            latent_shape=(16, 512, 512),
            steps=100,
            schedule="flow_dynamic",
            schedule_parameters={"base_tokens": 512, "max_tokens": 2048, "base_shift": 0, "max_shift": 4},
        )
