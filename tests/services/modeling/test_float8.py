"""Laws of weights in eight bits: bounded error, half the memory, exact scales, and only where it does no harm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.modeling.float8 import FLOAT8, is_stored_as_float8, row_scales, store_as_float8
from services.modeling.layers import Conv2d, GatedLinear, Linear, Upsample


def weight(*shape: int) -> torch.Tensor:
    """Rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.logspace(-3, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(*shape, generator=generator) * magnitudes


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    layer.weight.data = weight(64, 128)
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_off_by_a_sixteenth_of_itself_or_a_trifle_of_its_row(dtype: torch.dtype) -> None:
    layer = linear(dtype)
    exact = layer.weight.detach().double()
    store_as_float8(layer, dtype)
    error = (layer.weight.double() - exact).abs()
    largest = exact.abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(exact.abs() / 16, largest / 2**17)).all()


def test_scales_are_powers_of_two_that_bring_each_row_under_448() -> None:
    matrix = weight(64, 128)
    scales = row_scales(matrix)
    mantissas, _ = torch.frexp(scales)
    assert (mantissas == 0.5).all()
    largest = matrix.abs().amax(1) / scales
    assert ((largest > 223) & (largest <= 448)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_is_bit_for_bit_that_of_the_rounded_weights(dtype: torch.dtype) -> None:
    layer, rounded = linear(dtype), linear(dtype)
    store_as_float8(layer, dtype)
    rounded.weight.data = layer.weight.detach()
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(layer(x), rounded(x))


def test_what_was_rounded_already_is_not_changed_again() -> None:
    layer = linear(torch.bfloat16)
    store_as_float8(layer, torch.bfloat16)
    again = nn.Linear(128, 64).to(torch.bfloat16)
    again.weight.data = layer.weight.detach()
    store_as_float8(again, torch.bfloat16)
    assert torch.equal(again.weight, layer.weight)


def test_memory_is_halved() -> None:
    network = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3))).to(torch.bfloat16)
    before = sum(parameter.nbytes for parameter in network.parameters())
    store_as_float8(network, torch.bfloat16)
    assert sum(parameter.nbytes for parameter in network.parameters()) < 0.51 * before


def test_a_weight_in_float8_stays_as_it_is() -> None:
    layer = linear().requires_grad_(False)
    layer.weight = nn.Parameter(weight(64, 128).clamp(-448, 448).to(FLOAT8), requires_grad=False)
    stored = layer.weight.view(torch.uint8).clone()
    expected = layer.weight.float()
    store_as_float8(layer, torch.bfloat16)
    kept = next(parameter for parameter in layer.parameters() if parameter.dtype == FLOAT8)
    assert torch.equal(kept.view(torch.uint8), stored)
    assert torch.equal(layer.weight, expected.to(torch.bfloat16))


def test_norms_biases_embeddings_small_and_exempt_matrices_keep_their_dtype() -> None:
    network = nn.ModuleDict(
        {
            "embedding": nn.Embedding(64, 64),
            "norm": nn.LayerNorm(4096),
            "small": nn.Linear(8, 8),
            "modulation": nn.Sequential(nn.Linear(64, 128)),
            "matrix": nn.Linear(64, 128),
            "convolution": nn.Conv2d(64, 64, 3),
        }
    )
    store_as_float8(network, torch.float32, exempt=[network["modulation"]])
    assert {name for name, layer in network.named_modules() if is_stored_as_float8(layer)} == {"matrix", "convolution"}
    assert network["matrix"].bias.dtype == torch.float32


def test_an_exempt_matrix_in_float8_is_brought_to_the_dtype() -> None:
    layer = linear()
    layer.weight = nn.Parameter(weight(64, 128).to(FLOAT8), requires_grad=False)
    store_as_float8(layer, torch.bfloat16, exempt=[layer])
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Linear(64, 128), (2, 64)),
        (GatedLinear(64, 128), (2, 64)),
        (Conv2d(64, 64, 3), (1, 64, 8, 8)),
        (Upsample(64), (1, 64, 4, 4)),
    ],
    ids=["linear", "gated", "convolution", "upsample"],
)
def test_our_layers_compute_from_eight_bits(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer.requires_grad_(False)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    exact = layer(x)
    store_as_float8(layer, torch.float32)
    assert any(parameter.dtype == FLOAT8 for parameter in layer.parameters())
    assert float((layer(x) - exact).norm() / exact.norm()) < 0.05


def test_a_row_of_zeros_stays_zero() -> None:
    layer = linear()
    layer.weight.data.zero_()
    store_as_float8(layer, torch.float16)
    assert not layer.weight.any()
