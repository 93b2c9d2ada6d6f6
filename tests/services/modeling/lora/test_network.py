"""Adapters applied to layers: beside them, within their weights, and never a bit left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from services.modeling.layers import (
    Conv2d,
    GatedLinear,
    GeluLinear,
    Linear,
    Upsample,
    dense_weight,
    pack_weights,
)
from services.modeling.lora.adapter import Adapter, Applied, Change, Match
from services.modeling.lora.deltas import Delta, Dense, Kronecker, LowRank, Offset
from services.modeling.lora.fusing import WORTHWHILE_PASSES, FusionPolicy, fuse
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, Target, weight_shape
from services.modeling.placement import Placed, Placement, ResidentWeights
from tests.support.lora_files import random_tensor

ROWS = 5
NARROW, WIDE = 16, 256  # a convolution's weight is packed from 256 channels on
LAYERS: dict[str, Any] = {
    "linear": lambda: Linear(NARROW, 24),
    "torch's linear": lambda: nn.Linear(NARROW, 24, bias=False),
    "gated": lambda: GatedLinear(NARROW, 24),
    "gelu": lambda: GeluLinear(NARROW, 24),
    "convolution": lambda: Conv2d(NARROW, 24, 3, padding=1),
    "pointwise convolution": lambda: Conv2d(NARROW, 24, 1),
    "strided convolution": lambda: Conv2d(NARROW, 24, 3, stride=2, padding=1),
    "wide convolution": lambda: Conv2d(WIDE, WIDE, 3, padding=1),
    "wide strided convolution": lambda: Conv2d(WIDE, WIDE, 3, stride=2, padding=1),
    "upsampling": lambda: Upsample(NARROW),
    "wide upsampling": lambda: Upsample(WIDE),
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_network(layer: str, packed: bool) -> AdaptableNetwork:
    """One layer as a network."""
    torch.manual_seed(0)
    module = nn.Sequential(LAYERS[layer]()).requires_grad_(False)
    if packed:
        pack_weights(module)
    own = "0.conv.weight" if isinstance(module[0], Upsample) else "0.weight"
    return adaptable(module, Naming({own: ("layer.weight",)}))


def only_layer(network: AdaptableNetwork) -> Any:
    """The layer that the network computes with now."""
    return network.module.get_submodule("0")


def adaptable(module: nn.Sequential, naming: Naming) -> AdaptableNetwork:
    placement = Placement(device=torch.device("cpu"), dtype=torch.float32)
    return AdaptableNetwork(["denoiser"], Placed(module, placement, ResidentWeights(module)), [naming])


def make_delta(form: str, shape: tuple[int, ...], seed: int) -> Delta:
    if form == "low rank":
        return LowRank(random_tensor(4, *shape[1:], seed=seed), random_tensor(shape[0], 4, seed=seed + 1))
    if form == "kronecker":
        right = (shape[0] // 4, shape[1] // 2, *shape[2:])
        return Kronecker(random_tensor(4, 2, seed=seed), random_tensor(*right, seed=seed + 1))
    return Offset(random_tensor(shape[0], seed=seed)) if form == "offset" else Dense(random_tensor(*shape, seed=seed))


def make_adapter(network: AdaptableNetwork, form: str = "low rank", seed: int = 0) -> Adapter:
    (target,) = network.targets["layer"]
    delta = make_delta(form, network.weight_shape([target]), seed)
    return Adapter(f"a{seed}", "", f"{form} {seed}", {"denoiser": (Change(target, delta),)}, Match("kohya", 2, ()), 0)


def make_input(network: AdaptableNetwork) -> Tensor:
    width = weight_shape(only_layer(network))[1]
    is_linear = len(weight_shape(only_layer(network))) == 2
    shape = (ROWS, 7, width) if is_linear else (ROWS, width, 6, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x if is_linear else x.contiguous(memory_format=torch.channels_last)


def with_dense_changes(network: AdaptableNetwork, applied: Sequence[Applied], x: Tensor) -> Tensor:
    """What the network makes of x with the changes written out on its weight."""
    layer = only_layer(network)
    plain = LAYERS_BY_TYPE[type(layer)](layer)
    for each in applied:
        for change in each.adapter.changes["denoiser"]:
            changed, rows = plain.conv if isinstance(plain, Upsample) else plain, slice(*span_of(change))
            if isinstance(change.delta, Offset):
                bias = torch.zeros(len(changed.weight)) if changed.bias is None else changed.bias.clone()
                bias[rows] += each.scale * change.delta.change
                changed.bias = nn.Parameter(bias, requires_grad=False)
            else:
                changed.weight[rows] += each.scale * change.delta.weight()
    result: Tensor = plain(x)
    return result


def span_of(change: Change) -> tuple[int, int]:
    return change.target.start, change.target.stop


def _like(layer: nn.Module, other: nn.Module) -> nn.Module:
    """The other layer with the first one's numbers, unpacked."""
    target = other.conv if isinstance(other, Upsample) else other
    source = layer.conv if isinstance(layer, Upsample) else layer
    target.weight = nn.Parameter(dense_weight(layer).clone(), requires_grad=False)
    target.bias = source.bias
    return other


LAYERS_BY_TYPE: dict[type[nn.Module], Any] = {
    Linear: lambda each: _like(each, Linear(each.in_features, each.out_features)),
    nn.Linear: lambda each: _like(each, nn.Linear(each.in_features, each.out_features, bias=False)),
    GatedLinear: lambda each: _like(each, GatedLinear(each.in_features, each.out_features // 2)),
    GeluLinear: lambda each: _like(each, GeluLinear(each.in_features, each.out_features)),
    Conv2d: lambda each: _like(
        each,
        Conv2d(each.in_channels, each.out_channels, each.kernel_size, stride=each.stride, padding=each.padding),
    ),
    Upsample: lambda each: _like(each, Upsample(each.conv.in_channels)),
}


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["low rank", "kronecker", "dense", "offset"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_branch_a_fused_weight_and_a_written_out_change_are_equal(layer: str, form: str, packed: bool) -> None:
    network = make_network(layer, packed)
    x, applied = make_input(network), (Applied(make_adapter(network, form), 0.7),)
    expected = with_dense_changes(network, applied, x)
    before = network.module(x)
    assert float((before - expected).abs().max()) > 0.01
    with network.with_branches([applied] * ROWS):
        assert_close(network.module(x), expected)
    assert torch.equal(network.module(x), before)
    with fuse(network.module, "denoiser", applied).in_place(network.module):
        assert_close(network.module(x), expected)
    assert torch.equal(network.module(x), before)


@pytest.mark.parametrize("form", ["low rank", "offset"])
@pytest.mark.parametrize("layer", ["linear", "gated", "gelu", "convolution", "upsampling"])
def test_each_row_of_a_batch_has_its_own_adapters(layer: str, form: str) -> None:
    network = make_network(layer, packed=True)
    first, second = (make_adapter(network, form, seed) for seed in (0, 50))
    rows = [
        (Applied(first, 1.0),),
        (),
        (Applied(first, 1.0), Applied(second, -0.5)),
        (Applied(first, 1.0), Applied(second, 2.0)),
        (Applied(first, 1.0), Applied(second, 2.0)),
    ]
    x = make_input(network)
    with network.with_branches(rows):
        together = network.module(x)
    for row, applied in enumerate(rows):
        assert_close(together[row : row + 1], with_dense_changes(network, applied, x[row : row + 1]))


def test_changes_of_parts_of_a_fused_layer_touch_their_rows_only() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Linear(NARROW, 3 * NARROW)).requires_grad_(False)
    naming = Naming({"0.weight": ("to.q.weight", "to.k.weight", "to.v.weight")})
    network = adaptable(module, naming)
    assert network.targets["to_k"] == (Target("0", NARROW, 2 * NARROW),)
    (target,) = network.targets["to_k"]
    delta = make_delta("low rank", (NARROW, NARROW), 0)
    adapter = Adapter("k", "", "k", {"denoiser": (Change(target, delta),)}, Match("kohya", 2, ()), 0)
    x = torch.randn(2, 3, NARROW)
    before = module(x)
    with network.with_branches([(Applied(adapter, 1.0),)] * 2):
        q, k, v = (module(x) - before).chunk(3, dim=-1)
    assert not q.any()
    assert not v.any()
    assert isinstance(delta, LowRank)
    assert_close(k, x @ delta.weight().T)


def test_a_hook_is_gone_after_a_pass_that_failed() -> None:
    network = make_network("linear", packed=False)
    x, applied = make_input(network), (Applied(make_adapter(network), 1.0),)
    before = network.module(x)
    with pytest.raises(RuntimeError), network.with_branches([applied] * ROWS):
        network.module(x[..., :3])
    assert torch.equal(network.module(x), before)


def passes_until_fused(network: AdaptableNetwork, applied: tuple[Applied, ...], max_bytes: int) -> int | None:
    layer = only_layer(network)
    for count in range(1, 3 * WORTHWHILE_PASSES):
        with network.with_adapters([applied] * 2, max_bytes):
            if only_layer(network) is not layer:
                return count
        assert only_layer(network) is layer
    return None


def test_a_set_that_is_used_much_is_fused_for_batches_of_it_alone() -> None:
    network = make_network("gated", packed=True)
    weight, gate = only_layer(network).weight, only_layer(network).packed_gate
    x, applied = make_input(network), (Applied(make_adapter(network), 1.0),)
    expected = with_dense_changes(network, applied, x)
    assert passes_until_fused(network, applied, 2**30) == WORTHWHILE_PASSES
    layer = only_layer(network)
    with network.with_adapters([applied, ()], 2**30):
        assert only_layer(network) is layer
    with network.with_adapters([applied] * ROWS, 2**30):
        assert_close(network.module(x), expected)
    assert layer.weight is weight
    assert layer.packed_gate is gate


def test_a_set_that_would_take_too_much_memory_is_never_fused() -> None:
    network = make_network("linear", packed=False)
    size = prod(weight_shape(only_layer(network))) * 4
    applied = (Applied(make_adapter(network), 1.0),)
    assert passes_until_fused(network, applied, size - 1) is None
    assert passes_until_fused(network, applied, size) is not None


def test_an_adapter_that_is_forgotten_leaves_no_fused_layer() -> None:
    network = make_network("linear", packed=False)
    adapter = make_adapter(network)
    assert passes_until_fused(network, (Applied(adapter, 1.0),), 2**30) is not None
    network.forget(adapter)
    layer = only_layer(network)
    with network.with_adapters([(Applied(adapter, 1.0),)], 0):
        assert only_layer(network) is layer


def test_another_set_is_fused_only_when_it_is_clearly_more_used() -> None:
    policy, one, other = FusionPolicy(), (("one", 1.0),), (("other", 1.0),)
    assert [policy.is_due(one, None) for _ in range(WORTHWHILE_PASSES)][-1]
    due = []
    for _ in range(4 * WORTHWHILE_PASSES):
        due.append(policy.is_due(other, one))
        policy.is_due(one, one)
    assert not any(due)
    assert any(policy.is_due(other, one) for _ in range(4 * WORTHWHILE_PASSES))
