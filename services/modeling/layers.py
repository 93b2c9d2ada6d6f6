"""Linear and convolution layers for inference, whose weights can be packed for the CPU.

oneDNN computes with weights in blocks of its own. torch's operators bring a weight into that form on every call, which
for SD 1.5's convolutions at 8 x 8 takes as long as the convolution; `pack_weights` does it once. Packed layers also
apply what follows the product (bias, residual, GELU, gate) to its float32 sums, before the only rounding. The operators
are those that torch's own compiler emits for frozen models (`torch.ops.mkldnn`).

A packed weight is an opaque tensor; `weight.to_dense()` gives the original back, bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN chooses the blocks for a number of rows or a size of picture; measured, these do for larger and smaller ones.
_TYPICAL_ROWS = 4096
_TYPICAL_SIZE = 64

Activation = Literal["none", "gelu", "sigmoid"]


class TensorModule(nn.Module):
    """A module whose call returns one tensor; `nn.Module` leaves type checkers with Any."""

    __call__: Callable[..., Tensor]


class Linear(nn.Linear):
    """x Wᵀ + b (+ residual). x: [..., in], residual: [..., out] -> [..., out]."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.weight.is_mkldnn:
            return packed_linear(x, self.weight, self.bias, add=residual)
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual

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

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            value_bias, gate_bias = self.bias.chunk(2)
            gate = packed_linear(x, self.packed_gate, gate_bias, activation="gelu")
            return packed_linear(x, self.weight, value_bias, multiply=gate)
        value, gate = super().forward(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

    def pack(self) -> None:
        """Replaces the weight by the packed forms of its halves."""
        value, gate = self.weight.chunk(2)
        self.weight, self.packed_gate = _frozen(pack_linear_weight(value)), _frozen(pack_linear_weight(gate))


class Conv2d(nn.Conv2d):
    """A convolution (+ residual). x: [B, in, H, W], residual: [B, out, H', W'] -> [B, out, H', W']."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.weight.is_mkldnn:
            return _packed_conv2d(x, self.weight, self.bias, *self._geometry(), residual)
        y = super().forward(x)
        return y if residual is None else y + residual

    def pack(self) -> None:
        """Replaces the weight by its packed form."""
        padding, stride, dilation, groups = self._geometry()
        size = (1, self.in_channels, _TYPICAL_SIZE, _TYPICAL_SIZE)
        self.weight = _frozen(
            torch.ops.mkldnn._reorder_convolution_weight(self.weight, padding, stride, dilation, groups, size)
        )

    def _geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
        assert not isinstance(self.padding, str)  # no layer of ours says "same"
        return self.padding, self.stride, self.dilation, self.groups


@cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has fast packed layers for the dtype."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if device_type != "cpu" or not is_x86 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weights(module: nn.Module) -> None:
    """Packs the layers of a loaded module where the machine gains by it. One layer at a time is in memory twice."""
    for layer in module.modules():
        if isinstance(layer, Linear | GatedLinear | Conv2d) and can_pack(layer.weight.device.type, layer.weight.dtype):
            layer.pack()


def pack_linear_weight(weight: Tensor) -> Tensor:
    """[out, in] -> the same, packed for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    add: Tensor | None = None,
    multiply: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b, then one of: an activation, plus `add`, times `multiply`. x: [..., in] -> [..., out]."""
    y: Tensor
    if add is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    elif multiply is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, multiply, weight, bias, "mul")
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")  # "none": the exact GELU
    return y


def _packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Tensor:
    """A convolution with a packed weight (+ residual), in channels-last memory."""
    geometry = (padding, stride, dilation, groups)
    y: Tensor
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, None, [], None
        )
    return y


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
