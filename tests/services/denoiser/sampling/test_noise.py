import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.sampling.noise import NoiseSource

SHAPE = (1, 4, 8, 8)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 3, 8, 8), (1, 3)])
def test_draws_are_torch_randn_of_the_seed_in_order(shape: tuple[int, ...]) -> None:
    generator = torch.Generator("cpu").manual_seed(42)
    source = NoiseSource(42, shape)
    for index in range(3):
        assert torch.equal(source.draw(index), torch.randn(shape, generator=generator))


@given(st.lists(st.integers(0, 12), max_size=8))
def test_a_draw_depends_on_its_number_only(order: list[int]) -> None:
    source = NoiseSource(7, SHAPE)
    for index in order:
        assert torch.equal(source.draw(index), NoiseSource(7, SHAPE).draw(index))


def test_batch_mates_do_not_change_the_noise() -> None:
    alone, mate = NoiseSource(1, SHAPE), NoiseSource(2, SHAPE)
    expected = [NoiseSource(1, SHAPE).draw(index) for index in range(3)]
    for index in range(3):
        torch.randn(5)
        mate.draw(2 * index)
        assert torch.equal(alone.draw(index), expected[index])


def test_other_seeds_and_draws_differ() -> None:
    source = NoiseSource(1, SHAPE)
    assert not torch.equal(source.draw(0), source.draw(1))
    assert not torch.equal(source.draw(0), NoiseSource(2, SHAPE).draw(0))
