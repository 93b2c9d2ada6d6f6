"""Weights packed for the CPU, and the products with them.

oneDNN computes with weights in blocks of its own. torch's operators bring a weight into that form on every call, which
for SD 1.5's convolutions at 8 x 8 takes as long as the convolution; here it is done once. A product with a packed
weight also applies what follows it (bias, residual, GELU, gate) to its float32 sums, before the only rounding. The
operators are those that torch's own compiler emits for frozen models (`torch.ops.mkldnn`).

A packed weight is an opaque tensor (`is_mkldnn`); its `to_dense()` gives the original back, bit for bit.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

# oneDNN chooses the blocks for a number of rows or a size of picture; measured, these do for larger and smaller ones.
_TYPICAL_ROWS = 4096
_TYPICAL_SIZE = 64

Activation = Literal["none", "gelu", "gelu_tanh", "sigmoid"]
_FUSED: dict[Activation, tuple[str, str]] = {  # torch's names: an operation, and which form of it
    "none": ("none", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "sigmoid": ("sigmoid", "none"),
}


# Padding, stride, dilation (height and width each) and the number of groups.
ConvGeometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]


@cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has fast products with packed weights for the dtype."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if device_type != "cpu" or not is_x86 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    """x Wᵀ + b, then one of: an activation, plus `add`, times `multiply`. x: [..., in] -> [..., out].

    A weight that isn't packed is brought into blocks by the call itself, which is as good for a single use.
    """
    y: Tensor
    if add is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    elif multiply is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, multiply, weight, bias, "mul")
    else:
        operation, form = _FUSED[activation]
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, operation, [], form)
    return y


def pack_conv2d_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """[out, in, kernel, kernel] -> the same, packed for `packed_conv2d`."""
    size = (1, weight.shape[1] * geometry[-1], _TYPICAL_SIZE, _TYPICAL_SIZE)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, size)
    return packed


def packed_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, *, add: Tensor | None = None
) -> Tensor:
    """A convolution, then plus `add`. x: [B, in, H, W] -> [B, out, H', W'] in channels-last memory."""
    y: Tensor
    if add is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(x, add, weight, bias, *geometry, "add", 1.0, None, [], None)
    return y
