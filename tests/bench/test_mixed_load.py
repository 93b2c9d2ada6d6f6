"""How many steps of a batch the best order of mixed requests needs."""

from __future__ import annotations

from bench.mixed_load import fewest_calls
from safelight import GenerationOptions


def requests(*steps: int, guidance_scale: float, determinism: str = "default") -> list[GenerationOptions]:
    return [
        GenerationOptions(prompt="", steps=each, guidance_scale=guidance_scale, determinism=determinism)
        for each in steps
    ]


def test_no_fewer_than_the_longest_request_has_steps() -> None:
    assert fewest_calls(requests(50, 4, 4, guidance_scale=1.0)) == 50


def test_no_fewer_than_the_rows_fit_into() -> None:
    assert fewest_calls(requests(*[10] * 8, guidance_scale=4.0)) == 20


def test_requests_in_the_exact_class_share_none() -> None:
    assert fewest_calls(requests(10, 20, guidance_scale=1.0, determinism="exact")) == 30
