"""Laws of dealing rows: every row is computed once, neighbours stay together, nobody has two more than another."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.ranks.dealing import dealt


@given(st.integers(1, 40), st.integers(1, 8))
def test_every_row_is_dealt_once_in_order_and_evenly(rows: int, groups: int) -> None:
    parts = [list(range(rows))[part] for part in dealt(rows, groups)]
    assert list(chain(*parts)) == list(range(rows))
    sizes = [len(part) for part in parts]
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


def test_guided_requests_split_into_prompts_and_negative_prompts() -> None:
    assert dealt(6, 2) == [slice(0, 3), slice(3, 6)]
