from collections.abc import Mapping
from typing import Any

import pytest

from services.denoiser.sampling.noise_schedule import NoiseSchedule
from services.denoiser.sampling.planning import plan_sampling
from services.denoiser.sampling.schedules import karras

NOISE = NoiseSchedule()


def test_a_plan_pairs_each_sigma_with_the_timestep_it_was_trained_at() -> None:
    plan = plan_sampling(NOISE, sampler="euler", schedule="scaled_linear", steps=4)
    assert plan.timesteps == pytest.approx((999, 666, 333, 0), abs=1e-9)
    assert len(plan.sigmas) == 5


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [("euler", {}), ("dpmpp_2m", {}), ("ddim", {"eta": 0.0}), ("euler_ancestral", {"eta": 1.0})],
)
def test_each_sampler_has_the_defaults_of_the_field(sampler: str, parameters: Mapping[str, float]) -> None:
    assert plan_sampling(NOISE, sampler=sampler, schedule="karras", steps=4).parameters == parameters


def test_given_parameters_reach_the_sampler_and_the_schedule() -> None:
    plan = plan_sampling(
        NOISE,
        sampler="ddim",
        sampler_parameters={"eta": 0.5},
        schedule="karras",
        schedule_parameters={"rho": 3.0},
        steps=4,
    )
    assert plan.parameters == {"eta": 0.5}
    assert plan.sigmas == tuple(karras(NOISE, 4, 3.0))


def test_karras_takes_the_rho_of_the_paper_by_default() -> None:
    assert plan_sampling(NOISE, sampler="euler", schedule="karras", steps=4).sigmas == tuple(karras(NOISE, 4, 7.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "plms"}, "unknown sampler 'plms'; choose from ddim, dpmpp_2m, euler, euler_ancestral"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose from exponential, karras, scaled_linear"),
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
        plan_sampling(NOISE, **(defaults | arguments))
