"""Laws of streamed weights: same bits as resident ones, no more memory than planned, and no way to disturb them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from services.modeling.float8 import store_as_float8
from services.modeling.residency import Residency
from services.modeling.weight_streaming import OffloadedWeights, WeightBlock
from services.modeling.weight_transfer import Moment, SynchronousTransfer

WIDTH, DEPTH = 64, 9
BUDGETS = [0, 1, 120_000, 240_000, 10**9]


class Pending(NamedTuple):
    """A copy that has not happened yet."""

    copy: Callable[[], None]


class LateTransfer(SynchronousTransfer):
    """Copies at the last moment that is allowed: when somebody waits for it; before, the device's memory is noise or
    another block.

    So what is computed from a block that nobody waited for is wrong. `log` has what was asked for.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[str] = []
        self.fail_copies = False

    def room(self, size: int) -> Tensor:
        return super().room(size).fill_(0xFF)  # floats of these bytes are NaN

    def queue(self, copy: Callable[[], None], after: Moment) -> Moment:
        if self.fail_copies:
            raise torch.OutOfMemoryError("no memory for the copy")
        assert after == "now"
        self.log.append("copy")
        return Pending(copy)

    def wait(self, moment: Moment) -> None:
        assert isinstance(moment, Pending)
        moment.copy()

    def now(self) -> Moment:
        return "now"


class Layer(nn.Module):
    """A block: a linear map with a norm, and a nonlinearity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, width), nn.LayerNorm(WIDTH)
        self.out = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.linear(self.norm(x))))
        return x + out


class Network(nn.Module):
    """Layers of different widths between two ends, one of which computes first and last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH * (1 + index % 3)) for index in range(DEPTH))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.last(x)
        return out

    def weight_blocks(self) -> list[WeightBlock]:
        layers = [WeightBlock(f"layers.{index}", (layer,)) for index, layer in enumerate(self.layers)]
        return [WeightBlock("ends", (self.first, self.last)), *layers]


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def offloaded(
    network: Network, budget: int | None, *, leaves: bool = False, transfer: SynchronousTransfer | None = None
) -> OffloadedWeights:
    residency = Residency(budget_bytes=budget, leaves_when_idle=leaves)
    return OffloadedWeights(network.weight_blocks(), residency, transfer or LateTransfer())


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_whatever_the_budget_the_bits_are_those_of_resident_weights(budget: int | None, leaves: bool) -> None:
    expected = Network()(inputs())
    network = Network()
    weights = offloaded(network, budget, leaves=leaves)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(network(inputs()), expected)
            weights.leave()


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_peak_is_within_the_budget_or_two_blocks(budget: int) -> None:
    network = Network()
    weights = offloaded(network, budget)
    for _ in range(2):
        network(inputs())
    assert 0 < weights.account.peak_bytes == weights.plan.peak_bytes
    assert weights.account.peak_bytes <= max(budget, 2 * max(weights.plan.block_bytes))


def test_a_smaller_budget_streams_more() -> None:
    streamed = []
    for budget in sorted(BUDGETS, reverse=True):
        network = Network()
        weights = offloaded(network, budget)
        network(inputs())
        streamed.append(weights.account.streamed_bytes)
    assert streamed == sorted(streamed)
    assert (streamed[0], streamed[-1] > 0) == (0, True)


def test_every_block_is_copied_while_the_one_before_it_computes() -> None:
    network, transfer = Network(), LateTransfer()
    offloaded(network, 0, transfer=transfer)
    for index, layer in enumerate(network.layers):
        layer.register_forward_hook(lambda *_, index=index: transfer.log.append(f"computed {index}"))
    network(inputs())
    transfer.log.clear()
    network(inputs())  # from here on it is known what follows what
    copied_before = [transfer.log[: transfer.log.index(f"computed {index}")].count("copy") for index in range(DEPTH)]
    # The ends and layer 0 are there from the pass before; each layer's copy has begun before the one ahead is done.
    assert copied_before == [index + 1 for index in range(DEPTH)]


def test_nothing_is_left_on_the_device_after_leaving() -> None:
    network = Network()
    weights = offloaded(network, 240_000, leaves=True)
    network(inputs())
    assert weights.account.resident_bytes > 0
    weights.leave()
    assert weights.account.resident_bytes == 0


def test_weights_that_do_not_leave_stay() -> None:
    network = Network()
    weights = offloaded(network, 240_000)
    network(inputs())
    before = weights.account.resident_bytes
    weights.leave()
    assert weights.account.resident_bytes == before == weights.plan.peak_bytes


def test_visitors_are_copied_once_however_often_they_compute() -> None:
    network = Network()
    weights = offloaded(network, None, leaves=True)
    for _ in range(3):
        network(inputs())
    assert weights.account.streamed_bytes == sum(weights.plan.block_bytes)


@pytest.mark.parametrize("budget", [0, 120_000, None])
def test_after_an_exception_in_a_block_the_network_computes_as_before(budget: int | None) -> None:
    network = Network()
    expected = Network()(inputs())
    offloaded(network, budget, leaves=True)
    broken = network.layers[4].register_forward_pre_hook(lambda *_: 1 / 0)
    inner = network.layers[5].get_submodule("linear").register_forward_pre_hook(lambda *_: 1 / 0)
    for hook in (broken, inner):
        with pytest.raises(ZeroDivisionError):
            network(inputs())
        hook.remove()
    assert torch.equal(network(inputs()), expected)


@pytest.mark.parametrize("budget", [0, 120_000, None])
def test_after_a_copy_that_failed_the_network_computes_as_before(budget: int | None) -> None:
    network, transfer = Network(), LateTransfer()
    expected = Network()(inputs())
    weights = offloaded(network, budget, leaves=True, transfer=transfer)
    transfer.fail_copies = True
    with pytest.raises(torch.OutOfMemoryError):
        network(inputs())
    transfer.fail_copies = False
    assert torch.equal(network(inputs()), expected)
    weights.leave()
    assert weights.account.resident_bytes == 0


def test_blocks_may_compute_in_any_order() -> None:
    network, expected = Network(), Network()
    offloaded(network, 0)
    for order in ([3, 1, 1, 7], [0, 8, 4, 2], range(DEPTH)):
        x = y = inputs()
        for index in order:
            x, y = network.layers[index](x), expected.layers[index](y)
        assert torch.equal(x, y)


def test_threads_do_not_disturb_each_other() -> None:
    network = Network()
    x = [inputs() * scale for scale in range(1, 9)]
    expected = [Network()(each) for each in x]
    weights = offloaded(network, 120_000, leaves=True)
    barrier = threading.Barrier(4)

    def compute(which: int) -> bool:
        barrier.wait()
        equal = torch.equal(network(x[which]), expected[which])
        weights.leave()  # also while others compute
        return equal

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(8)))


def test_a_weight_is_seen_at_its_home_outside_of_its_computation() -> None:
    network, expected = Network(), Network().state_dict()
    offloaded(network, 0)
    network(inputs())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("budget", [0, 120_000, None])
def test_what_is_changed_at_home_lasts(budget: int | None) -> None:
    network, expected = Network(), Network()
    weights = offloaded(network, budget, leaves=True)
    network(inputs())
    with weights.at_home():
        for each in (network, expected):
            for parameter in each.parameters():
                parameter.mul_(1.5)
    assert torch.equal(network(inputs()), expected(inputs()))


def test_a_block_within_a_block_is_refused() -> None:
    network = Network()
    blocks = [WeightBlock("one", (network.layers[0],)), WeightBlock("all", (network,))]
    OffloadedWeights(blocks, Residency(budget_bytes=0), LateTransfer())
    with pytest.raises(RuntimeError, match="block one computes within block all: they must be one block"):
        network(inputs())


def test_the_order_of_dimensions_in_memory_is_kept() -> None:
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strides = conv.weight.stride()
    seen: list[Sequence[int]] = []
    conv.register_forward_pre_hook(lambda module, _: seen.append(module.weight.stride()))
    OffloadedWeights([WeightBlock("conv", (conv,))], Residency(budget_bytes=0), LateTransfer())
    conv(torch.randn(1, 8, 4, 4))
    assert [conv.weight.stride(), *seen] == [strides, strides]


def test_weights_in_eight_bits_stream_as_such() -> None:
    expected, network = Network(), Network()
    for each in (expected, network):
        store_as_float8(each, torch.float32)
    weights, whole = offloaded(network, 0), offloaded(Network(), 0)
    assert torch.equal(network(inputs()), expected(inputs()))
    assert max(weights.plan.block_bytes) < 0.7 * max(whole.plan.block_bytes)
