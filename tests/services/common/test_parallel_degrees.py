from collections.abc import Callable

import pytest

from services.common.parallel_degrees import (
    ONE_RANK,
    ParallelDegrees,
    over_guidance_and_tokens,
    over_rows,
    over_tokens,
)


def test_a_group_has_the_product_of_the_degrees() -> None:
    assert ParallelDegrees(cfg=2, ring=2, ulysses=2).ranks == 8
    assert ONE_RANK.ranks == 1


@pytest.mark.parametrize(("ring", "ulysses", "fsdp"), [(2, 1, False), (1, 2, False), (1, 1, True)])
def test_tensor_parallelism_shares_weights_alone(ring: int, ulysses: int, fsdp: bool) -> None:
    with pytest.raises(ValueError, match="'tensor' is combined"):
        ParallelDegrees(tensor=2, ring=ring, ulysses=ulysses, fsdp=fsdp)


def test_a_degree_is_one_or_more() -> None:
    with pytest.raises(ValueError, match="'ring' is 0"):
        ParallelDegrees(ring=0)


@pytest.mark.parametrize("usual", [over_rows, over_tokens, over_guidance_and_tokens])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_usual_degrees_use_all_devices(usual: Callable[[int], ParallelDegrees], devices: int) -> None:
    assert usual(devices).ranks == devices
    assert usual(1) == ONE_RANK
