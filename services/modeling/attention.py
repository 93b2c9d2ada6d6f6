"""Scaled dot-product attention over heads that lie side by side in the last dimension.

torch's kernel is used everywhere but for long bfloat16 sequences on a CPU that is fast at products of them. There it
takes as long as in float32: between its two matrix products it goes through every L x S block of logits several times.
`_fused_attention` hands the exponential to oneDNN, which applies it to the first product's float32 sums while they are
in registers. torch offers no exponential to fuse there but it offers the logistic function, and

    sigmoid(x) = e^x / (1 + e^x) = e^x (1 - O(e^x)),

so with every logit shifted far below zero it is the exponential to 1e-7; the shift cancels in the softmax's
quotient. How far to shift is estimated from the spread of the logits. Each row's sum of exponentials then proves
whether the estimate was good; a head for which it wasn't is computed again by torch's kernel.

B batch, L queries, S keys, H heads, D channels per head, W = D rounded up to leave room for further columns.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling.packing import can_pack, pack_linear_weight, packed_linear
from services.modeling.product_speed import bfloat16_is_fast

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_MIN_LENGTH = 1024  # below it the preparation costs more than it saves
_ROWS = 512  # queries to a block: its logits stay in the CPU's cache
_COLUMN_MULTIPLE = 16

# A row's sum of exponentials must lie between these. Below e^-16 no exponent is above -16, and sigmoid and exp agree to
# 1e-7. Above e^-50 no exponent that matters is under -87, where float32 ends.
_LARGEST_SUM, _SMALLEST_SUM = math.exp(-16), math.exp(-50)
_AIM = -34.0  # the logarithm of the sum that the shift aims at, in the middle between them
# ln(sum of e^s) of S = 4096 normal logits with deviation d is ln S + d²/2, or 4.1 d once the largest dominate (d > 4);
# ln S + 3 d is within 5 of it up to d = 12, where the limits leave 16.
_SUM_SLOPE = 3.0


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v per head. q: [B, L, H*D], k and v: [B, S, H*D] -> [B, L, H*D]."""
    q_BHLD, k_BHSD, v_BHSD = (x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2) for x in (q, k, v))
    if min(q.shape[1], k.shape[1]) >= _MIN_LENGTH and _can_fuse(q):
        return _fused_attention(q_BHLD, k_BHSD, v_BHSD)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2).flatten(2)


def _can_fuse(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and can_pack(q.device.type, q.dtype) and bfloat16_is_fast()


def _fused_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """The same by two oneDNN products per head and block of queries -> [B, L, H*D]."""
    batch, heads, length, width = q_BHLD.shape
    out_BLHD = q_BHLD.new_empty(batch, length, heads, width)
    for b in range(batch):
        for h in range(heads):  # one by one, so that what is made on the way stays in the CPU's cache
            q_LW, k_SW = _shifted_logit_factors(q_BHLD[b, h], k_BHSD[b, h])
            if not _attend(q_LW, k_SW, _values_and_ones(v_BHSD[b, h]), out_BLHD[b, :, h]):
                head = (slice(b, b + 1), slice(h, h + 1))
                out_BLHD[b, :, h] = F.scaled_dot_product_attention(q_BHLD[head], k_BHSD[head], v_BHSD[head])[0, 0]
    return out_BLHD.flatten(2)


def _shifted_logit_factors(q_LD: Tensor, k_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices [L, W] and [S, W] whose product is a head's logits less each row's mean and shift."""
    (length, width), keys = q_LD.shape, len(k_SD)
    k = k_SD.float()
    k = (k - k.mean(0)).div_(math.sqrt(width))  # takes a constant off each row of logits
    covariance = (k.mT @ k / keys).to(q_LD.dtype)
    deviation = (q_LD @ covariance).mul_(q_LD).sum(-1, dtype=torch.float32).clamp_(min=0).sqrt_()
    q_LW = q_LD.new_zeros(length, _padded(width))
    q_LW[:, :width] = q_LD
    q_LW[:, width] = _AIM - math.log(keys) - _SUM_SLOPE * deviation
    k_SW = k_SD.new_zeros(keys, _padded(width))
    k_SW[:, :width] = k
    k_SW[:, width] = 1
    return q_LW, k_SW


def _values_and_ones(v_SD: Tensor) -> Tensor:
    """A head's values as [W, S]; the columns beyond D hold ones and so yield the sums of the exponentials.

    Each of them sums over another part of the keys, so that their roundings to bfloat16 average out.
    """
    keys, width = v_SD.shape
    spare = _padded(width) - width
    v_WS = v_SD.new_zeros(width + spare, keys)
    v_WS[:width] = v_SD.mT
    for part in range(spare):
        v_WS[width + part, part::spare] = 1
    return v_WS


def _attend(q_LW: Tensor, k_SW: Tensor, v_WS: Tensor, out_LD: Tensor) -> bool:
    """Writes one head's output; False if a row's sum shows that the shift was wrong for it."""
    length, width = out_LD.shape
    keys, values = pack_linear_weight(k_SW), pack_linear_weight(v_WS)
    sums = out_LD.new_empty(length, 1, dtype=torch.float32)
    for start in range(0, length, _ROWS):
        rows = slice(start, start + _ROWS)
        weighted = packed_linear(packed_linear(q_LW[rows], keys, activation="sigmoid"), values)
        torch.sum(weighted[:, width:], 1, keepdim=True, dtype=torch.float32, out=sums[rows])
        torch.div(weighted[:, :width], sums[rows], out=out_LD[rows])
    return bool(sums.min() > _SMALLEST_SUM) and bool(sums.max() < _LARGEST_SUM)


def _padded(width: int) -> int:
    """The channels of a head with one or more columns to spare."""
    return (width // _COLUMN_MULTIPLE + 1) * _COLUMN_MULTIPLE
