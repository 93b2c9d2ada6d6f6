"""Laws of changes that are cut to a shard of a layer: what is left of one is that part of it, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.modeling.lora.adapter import Change
from services.modeling.lora.deltas import Delta, Dense, Kronecker, LowRank, Offset, WeightDelta
from services.modeling.lora.maps import LinearMap
from services.modeling.lora.targets import Target
from services.modeling.parallel.mesh import Axis
from services.modeling.parallel.shards import Span, even_shard
from tests.support.lora_files import random_tensor

HEIGHT, WIDTH = 24, 16
DELTAS: dict[str, WeightDelta] = {
    "low rank": LowRank(random_tensor(3, WIDTH, seed=0), random_tensor(HEIGHT, 3, seed=1)),
    "kronecker": Kronecker(random_tensor(6, 4, seed=0), random_tensor(HEIGHT // 6, WIDTH // 4, seed=1)),
    "dense": Dense(random_tensor(HEIGHT, WIDTH, seed=0)),
}
SPANS: dict[str, tuple[Span, ...]] = {"along its factors": ((0, 4), (8, 16)), "across them": ((1, 3), (6, 11))}


@pytest.mark.parametrize("form", DELTAS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_columns_of_a_change_are_those_of_its_matrix(form: str, spans: tuple[Span, ...]) -> None:
    x = torch.randn(5, WIDTH)
    kept = [column for span in spans for column in range(*span)]
    cut = DELTAS[form].columns(spans)
    torch.testing.assert_close(cut.weight(), DELTAS[form].weight()[:, kept])
    torch.testing.assert_close(cut.branch(x[:, kept], LinearMap()), x[:, kept] @ cut.weight().T)


def test_a_kronecker_product_that_is_cut_along_its_factors_stays_one() -> None:
    assert isinstance(DELTAS["kronecker"].columns(SPANS["along its factors"]), Kronecker)


@pytest.mark.parametrize("form", DELTAS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_have_the_whole_change_of_some_rows(form: str, ranks: int) -> None:
    start, stop = 5, 19
    change = Change(Target("layer", start, stop), DELTAS[form].rows(start, stop))
    whole = torch.zeros(HEIGHT, WIDTH)
    for rank in range(ranks):
        shard = even_shard(0, [8, 16], Axis(rank, ranks))
        held = [row for span in shard.spans for row in range(*span)]
        for each in change.within(shard):
            whole[held[each.target.start : each.target.stop]] += _matrix(each.delta)
    torch.testing.assert_close(whole[start:stop], _matrix(change.delta))
    assert float(whole.abs().sum()) == pytest.approx(float(_matrix(change.delta).abs().sum()))


def _matrix(delta: Delta) -> Tensor:
    assert not isinstance(delta, Offset)
    return delta.weight()


def test_of_the_ranks_whose_outputs_are_summed_one_has_the_change_of_the_bias() -> None:
    offset = Offset(random_tensor(HEIGHT, seed=0))
    held = [offset.columns(even_shard(1, [8, 8], Axis(rank, 4)).spans).change for rank in range(4)]
    assert torch.equal(sum(held, torch.zeros(HEIGHT)), offset.change)
