"""Packed layers equal unpacked ones, and packing loses nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from services.modeling import layers
from services.modeling.layers import (
    Conv2d,
    GatedLinear,
    GeluLinear,
    Linear,
    Upsample,
    dense_weight,
    pack_weights,
    phase_kernels,
    with_weight,
)
from services.modeling.packing import can_pack
from services.modeling.weights import open_checkpoint

needs_packing = pytest.mark.skipif(not can_pack("cpu", torch.float32), reason="this CPU has no packed products")

LAYERS: dict[str, tuple[Callable[[], Linear | Conv2d], tuple[int, ...]]] = {
    "linear": (lambda: Linear(24, 40), (2, 5, 24)),
    "linear without bias": (lambda: Linear(24, 40, bias=False), (3, 24)),
    "3x3": (lambda: Conv2d(32, 48, 3, padding=1), (2, 32, 6, 8)),
    "3x3, odd size": (lambda: Conv2d(32, 48, 3, padding=1), (1, 32, 5, 7)),
    "3x3, few channels": (lambda: Conv2d(4, 48, 3, padding=1), (2, 4, 6, 8)),
    "3x3, stride 2": (lambda: Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 5, 8)),
    "1x1": (lambda: Conv2d(32, 48, 1), (2, 32, 6, 8)),
    "1x1, stride 2": (lambda: Conv2d(32, 48, 1, stride=2), (2, 32, 5, 8)),
}


LayerT = TypeVar("LayerT", bound=nn.Module)


@pytest.fixture(autouse=True)
def _layers_of_these_tests_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is meant for wide convolutions is tested on small ones, which are as exact as the tolerances."""
    monkeypatch.setattr(layers, "_MIN_PACKED_CHANNELS", 32)


def packed(layer: LayerT) -> LayerT:
    """A packed copy."""
    layer = copy.deepcopy(layer)
    pack_weights(layer)
    return layer


def bytes_of(network: nn.Module) -> int:
    return sum(each.nbytes for each in network.parameters())


def input_of(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@needs_packing
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_equals_the_layer(case: str, with_residual: bool) -> None:
    make, shape = LAYERS[case]
    layer, x = make(), input_of(shape)
    layer.requires_grad_(False)
    residual = torch.randn_like(layer(x)) if with_residual else None
    torch.testing.assert_close(packed(layer)(x, residual), layer(x, residual), rtol=1e-5, atol=1e-6)


@needs_packing
def test_a_packed_gelu_equals_the_gelu() -> None:
    layer, x = GeluLinear(24, 40), input_of((2, 5, 24))
    layer.requires_grad_(False)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(packed(layer)(x), expected, rtol=1e-5, atol=1e-6)


@needs_packing
def test_a_packed_gate_equals_the_gate() -> None:
    layer, x = GatedLinear(24, 40), input_of((2, 5, 24))
    layer.requires_grad_(False)
    torch.testing.assert_close(packed(layer)(x), layer(x), rtol=1e-5, atol=1e-6)


@needs_packing
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_weight_gives_the_original_back(case: str) -> None:
    layer = LAYERS[case][0]()
    assert torch.equal(dense_weight(packed(layer)), layer.weight)


@pytest.mark.parametrize("size", [None, (10, 14), (9, 13)])
@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("pack", [pytest.param(True, marks=needs_packing), False])
def test_upsampling_equals_nearest_neighbour_and_a_convolution(
    size: tuple[int, int] | None, channels: int, pack: bool
) -> None:
    layer = Upsample(channels).requires_grad_(False)
    x = input_of((2, channels, 5, 7))
    repeated = F.interpolate(x, size=size or (10, 14), mode="nearest")
    expected = F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1)
    actual = (packed(layer) if pack else layer)(x, size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_phase_kernels_keep_the_sum_of_the_weights() -> None:
    weight = torch.randn(5, 7, 3, 3)
    for kernel in phase_kernels(weight):
        torch.testing.assert_close(kernel.sum(dim=(2, 3)), weight.sum(dim=(2, 3)))


@needs_packing
@pytest.mark.parametrize("layer", [Conv2d(16, 48, 3, padding=1), Upsample(16)], ids=["conv", "upsample"])
def test_narrow_convolutions_are_left_to_torch(layer: Conv2d | Upsample) -> None:
    made = packed(layer)
    assert not any(tensor.is_mkldnn for tensor in [made.weight, *(getattr(made, "_phases", None) or [])])


@needs_packing
@pytest.mark.parametrize(("spare", "tiled"), [(None, 3), (0, 0), (1, 1), (2, 2), (10, 3)])
def test_a_budget_bounds_the_faster_forms_of_weights(spare: int | None, tiled: int) -> None:
    """spare: what the budget leaves, in forms."""
    network = nn.Sequential(*(Conv2d(32, 32, 3, padding=1) for _ in range(2)), Upsample(32)).requires_grad_(False)
    x = input_of((2, 32, 6, 8))
    expected = network(x)
    weights, form = bytes_of(network), 32 * 32 * 16 * 4
    pack_weights(network, None if spare is None else weights + spare * form)
    assert [getattr(layer, "_tiles", None) or getattr(layer, "_phases", None) for layer in network].count(
        None
    ) == 3 - tiled
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


@needs_packing
def test_the_narrowest_convolutions_get_their_forms_first() -> None:
    wide, narrow = (Conv2d(width, width, 3, padding=1).requires_grad_(False) for width in (64, 32))
    network = nn.Sequential(wide, narrow)
    pack_weights(network, bytes_of(network) + wide.tile_bytes() - 1)
    assert (wide._tiles is None, narrow._tiles is None) == (True, False)


@needs_packing
@pytest.mark.parametrize("spare", [7 / 9, 0.75])
def test_a_weight_that_is_a_mapped_file_takes_nothing_beside_its_form(spare: float, tmp_path: Path) -> None:
    """spare: what the budget leaves, in weights."""
    layer = Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    save_file({"weight": layer.weight.detach()}, tmp_path / "a.safetensors")
    mapped = open_checkpoint(tmp_path / "a.safetensors").tensor("weight")
    layer.weight = nn.Parameter(mapped, requires_grad=False)
    pack_weights(layer, bytes_of(layer) + int(spare * mapped.nbytes))
    assert (layer._tiles is not None) == (spare == 7 / 9)


@needs_packing
@pytest.mark.parametrize(("least", "tiled"), [(0, False), (2**30, True)])
def test_without_a_budget_only_a_small_network_gets_all_forms(
    least: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SMALL_NETWORK_BYTES", least)
    assert (packed(Conv2d(32, 32, 3, padding=1))._tiles is not None) == tiled


@needs_packing
@pytest.mark.parametrize("spare", [0, 2**20])
def test_another_weight_gets_the_form_that_the_layer_has(spare: int) -> None:
    layer = Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    pack_weights(layer, bytes_of(layer) + spare)
    other = with_weight(layer, dense_weight(layer) + 1.0, layer.bias)
    assert isinstance(other, Conv2d)
    assert (other._tiles is None) == (layer._tiles is None)
    assert torch.equal(dense_weight(other), dense_weight(layer) + 1.0)


def test_layers_that_cannot_be_packed_are_left_alone() -> None:
    layer = Linear(8, 8).to(torch.float64)
    pack_weights(layer)
    assert not layer.weight.is_mkldnn
