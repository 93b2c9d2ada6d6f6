"""Linear and convolution layers for inference. `pack_weights` gives them what is fastest on the machine's CPU.

An unpacked layer is torch's own, with the residual added; so it stays on a GPU.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Protocol, TypeGuard, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.common.allocator import return_freed_memory
from services.modeling.float8 import is_stored_as_float8
from services.modeling.mapped_memory import is_mapped, release_mapped
from services.modeling.packing import (
    ConvGeometry,
    can_pack,
    pack_conv2d_weight,
    pack_linear_weight,
    packed_conv2d,
    packed_linear,
)
from services.modeling.winograd import Tiles, bytes_of_tiles, pack_tiles, tiled_conv2d

Layer = TypeVar("Layer", bound=nn.Module)

_UNPADDED: ConvGeometry = ((0, 0), (1, 1), (1, 1), 1)
# Of the two phases of an upsampling, the rows (or columns) of the 3x3 kernel that become each of the 2x2 one.
_PHASES = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
# Narrower convolutions are left to torch. oneDNN's blocks for them depend on the size of the picture, and a weight in
# blocks that don't fit is brought into others on every call, by oneDNN's slowest routine; and tiles don't pay.
_MIN_PACKED_CHANNELS = 256
# Beyond their own bytes, weights may take this share of them for faster forms unless a budget says otherwise: it buys
# a UNet its finest levels' forms, and most of the time that all would save. Small networks (VAEs) get all of theirs.
_USUAL_SHARE = 20
_SMALL_NETWORK_BYTES = 2**30
# Weights that are packed before freed memory is given back: what they leave of the weights as loaded, in holes, would
# be a tenth.
_BYTES_BETWEEN_RETURNS = 2**25


@runtime_checkable
class Packable(Protocol):
    """A layer that can bring its weight into a form that is faster to compute with."""

    weight: Tensor

    def pack(self) -> None:
        """Do so."""
        ...


@runtime_checkable
class Tileable(Packable, Protocol):
    """A layer that `pack` may give another form beside its weight: faster, and nearly twice as large again."""

    may_tile: bool

    def tile_bytes(self) -> int:
        """What the other form takes; 0: the layer has no use for one."""
        ...


class TensorModule(nn.Module):
    """A module whose call returns one tensor; `nn.Module` leaves type checkers with Any."""

    __call__: Callable[..., Tensor]


class Linear(nn.Linear):
    """x Wᵀ + b (+ residual). x: [..., in], residual: [..., out] -> [..., out]."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.weight  # once: what is stored in eight bits is brought back each time
        if weight.is_mkldnn:
            return packed_linear(x, weight, self.bias, add=residual)
        y = F.linear(x, weight, self.bias)
        return y if residual is None else y + residual

    def pack(self) -> None:
        """Replaces the weight by its packed form."""
        self.weight = _frozen(pack_linear_weight(self.weight))


class GeluLinear(nn.Linear):
    """gelu(x Wᵀ + b), the GELU by its tanh approximation (Hendrycks and Gimpel 2016). x: [..., in] -> [..., out]."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """delta: [..., out], added before the GELU."""
        weight = self.weight
        if not weight.is_mkldnn:
            projected = F.linear(x, weight, self.bias)
            return F.gelu(projected if delta is None else projected + delta, approximate="tanh")
        if delta is None:
            return packed_linear(x, weight, self.bias, activation="gelu_tanh")
        return F.gelu(packed_linear(x, weight, self.bias, add=delta), approximate="tanh")

    def pack(self) -> None:
        """Replaces the weight by its packed form."""
        self.weight = _frozen(pack_linear_weight(self.weight))


class GatedLinear(nn.Linear):
    """GEGLU (Shazeer 2020): (x Vᵀ + c) * gelu(x Wᵀ + d), with the exact GELU. x: [..., in] -> [..., out].

    The weight [2 * out, in] is V above W, as checkpoints have it.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, 2 * width)
        self.register_parameter("packed_gate", None)

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """delta: [..., 2 * out], added to both products before the gate."""
        weight = self.weight
        if weight.is_mkldnn:
            return self._packed_forward(x, delta)
        projected = F.linear(x, weight, self.bias)
        value, gate = (projected if delta is None else projected + delta).chunk(2, dim=-1)
        return value * F.gelu(gate)

    def _packed_forward(self, x: Tensor, delta: Tensor | None) -> Tensor:
        value_bias, gate_bias = self.bias.chunk(2)
        if delta is None:
            gate = packed_linear(x, self.packed_gate, gate_bias, activation="gelu")
            return packed_linear(x, self.weight, value_bias, multiply=gate)
        value_delta, gate_delta = (half.contiguous() for half in delta.chunk(2, dim=-1))
        gate = packed_linear(x, self.packed_gate, gate_bias, add=gate_delta)
        return packed_linear(x, self.weight, value_bias, add=value_delta) * F.gelu(gate)

    def pack(self) -> None:
        """Replaces the weight by the packed forms of its halves."""
        value, gate = self.weight.chunk(2)
        self.weight, self.packed_gate = _frozen(pack_linear_weight(value)), _frozen(pack_linear_weight(gate))


class Conv2d(nn.Conv2d):
    """A convolution (+ residual). x: [B, in, H, W], residual: [B, out, H', W'] -> [B, out, H', W'].

    Packed, the weight of a 1 x 1 kernel is a matrix. That of a wide 3 x 3 one in float32 may stay (as loaded, the
    mapped file) beside tiles, which are computed with.
    """

    __call__: Callable[..., Tensor]
    may_tile = True
    _tiles: Tiles | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._tiles is not None:
            return tiled_conv2d(x, self._tiles, self.bias, residual)
        weight = self.weight
        if weight.is_mkldnn and weight.ndim == 2:
            return _pixelwise_linear(x, weight, self.bias, residual)
        if weight.is_mkldnn:
            return packed_conv2d(x, weight, self.bias, self._geometry(), add=residual)
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y if residual is None else y + residual

    def pack(self) -> None:
        """Gives the layer its packed weight."""
        if self.kernel_size == (1, 1) and self._geometry() == _UNPADDED:
            self.weight = _frozen(pack_linear_weight(self.weight.flatten(1)))
        elif min(self.in_channels, self.out_channels) < _MIN_PACKED_CHANNELS:
            self.weight = _frozen(self.weight.contiguous(memory_format=torch.channels_last))
        elif self.may_tile and self.tile_bytes():
            self._tiles = pack_tiles(self.weight)
        else:
            self.weight = _frozen(pack_conv2d_weight(self.weight, self._geometry()))

    def tile_bytes(self) -> int:
        """What the tiles of a wide 3 x 3 kernel in float32 take; 0 for another."""
        is_wide = min(self.in_channels, self.out_channels) >= _MIN_PACKED_CHANNELS
        is_plain = self.kernel_size == (3, 3) and self._geometry() == ((1, 1), (1, 1), (1, 1), 1)
        return bytes_of_tiles(self.weight) if is_wide and is_plain and self.weight.dtype == torch.float32 else 0

    def _geometry(self) -> ConvGeometry:
        padding = cast(tuple[int, int], self.padding)  # no layer of ours says "same"
        return padding, self.stride, self.dilation, self.groups


class Upsample(TensorModule):
    """Doubles both sides, or comes to a given size: nearest neighbour, then a 3x3 convolution.

    Nearest neighbour repeats pixels, so the nine taps of the convolution meet only 2x2 different ones. Each of the four
    phases of the output (even or odd row and column) is therefore a 2x2 convolution of the small map whose weights are
    sums of the 3x3 ones: 16 products instead of 36, and the repeated map never exists.
    """

    may_tile = True
    _phases: Sequence[Tensor] | None = None

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels if out_channels is None else out_channels, 3, padding=1)

    @property
    def weight(self) -> Tensor:
        """That of the convolution."""
        return self.conv.weight

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """x: [B, C, H, W] -> [B, C_out, 2H, 2W], or [B, C_out, *size]."""
        batch, _, height, width = x.shape
        doubled = (2 * height, 2 * width)
        if tuple(size or doubled) != doubled or (self._phases is None and self.weight.is_mkldnn):
            return self.conv(F.interpolate(x, size=list(size or doubled), mode="nearest"))
        kernels = self._phases or list(phase_kernels(self.weight))
        padded = F.pad(x, (1, 1, 1, 1))
        out = x.new_empty((batch, 2 * height, 2 * width, self.conv.out_channels)).permute(0, 3, 1, 2)
        for (row, column), kernel in zip(product(range(2), range(2)), kernels, strict=True):
            window = padded[:, :, row : row + height + 1, column : column + width + 1]
            out[:, :, row::2, column::2] = _unpadded_conv2d(window, kernel, self.conv.bias)
        return out

    def pack(self) -> None:
        """Computes the phases, and packs wide ones; without them, the convolution, which has little work otherwise."""
        self.conv.may_tile = False
        if not self.may_tile:
            self.conv.pack()
        elif min(self.conv.in_channels, self.conv.out_channels) < _MIN_PACKED_CHANNELS:
            self._phases = [
                kernel.contiguous(memory_format=torch.channels_last) for kernel in phase_kernels(self.weight)
            ]
        else:
            self._phases = [pack_conv2d_weight(kernel, _UNPADDED) for kernel in phase_kernels(self.weight)]

    def tile_bytes(self) -> int:
        """What the phases take."""
        return self.weight.nbytes // 9 * 16


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in, ...] as it was loaded, whatever form the layer computes with."""
    if isinstance(layer, Upsample):
        layer = layer.conv
    weight = cast(Tensor, layer.weight).detach()
    if not weight.is_mkldnn:
        return weight
    if isinstance(layer, GatedLinear):
        return torch.cat([weight.to_dense(), layer.packed_gate.to_dense()])
    dense = weight.to_dense()
    return dense.view(*dense.shape[:2], *layer.kernel_size) if isinstance(layer, Conv2d) else dense


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias [out]; None: the layer has none."""
    return cast("Tensor | None", (layer.conv if isinstance(layer, Upsample) else layer).bias)


def with_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like this one, in other memory, with another weight and bias, in the form that this one has."""
    other = _unpacked_copy(layer)
    if isinstance(other, Upsample):
        other.conv = _unpacked_copy(other.conv)
    changed = other.conv if isinstance(other, Upsample) else other
    changed.weight = _frozen(weight)
    changed.register_parameter("bias", None if bias is None else _frozen(bias))
    for packable in _packable(other):
        _pack(packable)
    return other


def phase_kernels(weight: Tensor) -> Iterator[Tensor]:
    """The 2x2 kernels [C_out, C_in, 2, 2] of a 3x3 one [C_out, C_in, 3, 3], row phase first, in its dtype.

    An even output row sees input rows (before; here, here), an odd one (here, here; after). Sums are taken in float32.
    """
    for rows, columns in product(_PHASES, _PHASES):
        sums = [weight[:, :, row, column].sum((2, 3), dtype=torch.float32) for row, column in product(rows, columns)]
        yield torch.stack(sums, dim=-1).view(*weight.shape[:2], 2, 2).to(weight.dtype)


def pack_weights(module: nn.Module, budget_bytes: int | None = None) -> None:
    """Packs the layers of a loaded module where the machine gains by it. One layer at a time is in memory twice.

    budget_bytes: of all weights; what it leaves beyond their own bytes goes to faster forms. None: all of them for a
    small network, else a twentieth of the weights.
    """
    layers = list(_packable(module))
    _share_out(_spare_bytes(module, budget_bytes), [layer for layer in layers if isinstance(layer, Tileable)])
    packed = 0
    for layer in layers:
        packed += layer.weight.nbytes
        _pack(layer)
        if packed >= _BYTES_BETWEEN_RETURNS:
            return_freed_memory()
            packed = 0


def _spare_bytes(module: nn.Module, budget_bytes: int | None) -> float:
    """What faster forms may take."""
    weights = sum(each.nbytes for each in module.parameters())
    if budget_bytes is not None:
        return budget_bytes - weights
    return math.inf if weights < _SMALL_NETWORK_BYTES else weights / _USUAL_SHARE


def _share_out(spare: float, layers: Iterable[Tileable]) -> None:
    """Lets layers have their faster forms as far as these fit, those with small weights first.

    What a form saves grows with its bytes and with the places that it is used at, of which narrow layers have most.
    Beside it a weight that is a mapped file takes nothing; in the form's place it would be packed and take its bytes.
    """
    for layer in sorted(layers, key=lambda layer: layer.weight.nbytes):
        if form := layer.tile_bytes():
            cost = form - (layer.weight.nbytes if is_mapped(layer.weight) else 0)
            layer.may_tile = cost <= spare
            spare -= layer.may_tile * cost


def _pack(layer: Packable) -> None:
    loaded = layer.weight
    layer.pack()
    release_mapped(loaded)


def _packable(module: nn.Module) -> Iterator[Packable]:
    """The layers that have a weight to pack, on a machine that gains by it. An Upsample packs its own convolution."""
    if _packs(module):
        if can_pack(module.weight.device.type, module.weight.dtype):
            yield module
        return
    for part in module.children():
        yield from _packable(part)


def _packs(layer: nn.Module) -> TypeGuard[Packable]:
    """Whether the layer has a weight to pack; one in eight bits is left so."""
    matrix = layer.conv if isinstance(layer, Upsample) else layer
    return not is_stored_as_float8(matrix) and isinstance(layer, Packable)


def _pixelwise_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A linear layer over the channels of every pixel. x: [B, in, H, W] -> [B, out, H, W] in channels-last memory."""
    add = None if residual is None else residual.permute(0, 2, 3, 1)
    return packed_linear(x.permute(0, 2, 3, 1), weight, bias, add=add).permute(0, 3, 1, 2)


def _unpadded_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return packed_conv2d(x, weight, bias, _UNPADDED) if weight.is_mkldnn else F.conv2d(x, weight, bias)


def _unpacked_copy(layer: Layer) -> Layer:
    """The layer with tables of its own, and without packed forms; its tensors are shared."""
    other = copy.copy(layer)
    vars(other).update({name: table.copy() for name, table in vars(layer).items() if isinstance(table, dict)})
    for packed in ("_tiles", "_phases", "packed_gate"):
        if getattr(other, packed, None) is not None:
            setattr(other, packed, None)
    return other


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
