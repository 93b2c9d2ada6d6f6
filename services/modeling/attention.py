"""Scaled dot-product attention over heads that lie side by side in the last dimension.

torch's kernel is used everywhere but for long bfloat16 sequences on a CPU that is fast at products of them. There it
takes as long as in float32: between its two matrix products it goes through every L x S block of logits several times.
`_fused_attention` hands the exponential to oneDNN, which applies it to the first product's float32 sums while they are
in registers. torch offers no exponential to fuse there but it offers the logistic function, and

    sigmoid(x) = e^x / (1 + e^x) = e^x (1 - O(e^x)),

so with every logit shifted far below zero it is the exponential to 1e-7; the shift cancels in the softmax's
quotient. How far to shift is estimated from a sample of the logits. Each row's sum of exponentials then proves
whether the estimate was good; a head for which it wasn't is computed again by torch's kernel.

B batch, L queries, S keys, H heads, D channels per head, W = D rounded up to leave room for further columns.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling.packing import can_pack, packed_linear
from services.modeling.product_speed import bfloat16_is_fast

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_MIN_LENGTH = 512  # below it the preparation costs more than it saves
_BLOCK_LOGITS = 2**21  # of a block of queries: they stay in the CPU's cache
_COLUMN_MULTIPLE = 16
_SAMPLED_KEYS = 64

# A row's sum of exponentials must lie between these. Below e^-16 no exponent is above -16, and sigmoid and exp agree to
# 1e-7. Above e^-50 no exponent that matters is under -87, where float32 ends.
_LARGEST_SUM, _SMALLEST_SUM = math.exp(-16), math.exp(-50)
_AIM = -34.0  # the logarithm of the sum that the shift aims at, in the middle between them
# ln(sum of e^s) of S = 4096 normal logits with deviation d is ln S + d²/2, or 4.1 d once the largest dominate (d > 4);
# ln S + 3 d is within 5 of it up to d = 12, where the limits leave 16; up to d = 8 the sample's error fits in, too.
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
    """The same by two oneDNN products per head and block of queries -> [B, L, H*D].

    All else is done for all heads at once: on small tensors, waking the threads takes longer than the work.
    """
    batch, heads, length, width = q_BHLD.shape
    q_BHLW, k_BHSW, v_BHSW = _extended_factors(q_BHLD, k_BHSD, v_BHSD)
    weighted_BHLW = torch.empty_like(q_BHLW)
    for of_head in zip(*(x.flatten(0, 1) for x in (q_BHLW, k_BHSW, v_BHSW, weighted_BHLW)), strict=True):
        _attend(*of_head)
    sums = weighted_BHLW[..., width:].sum(-1, keepdim=True, dtype=torch.float32)
    out_BLHD = q_BHLD.new_empty(batch, length, heads, width)
    torch.div(weighted_BHLW[..., :width], sums, out=out_BLHD.transpose(1, 2))
    for b, h in _heads_with_wrong_shift(sums):
        head = (slice(b, b + 1), slice(h, h + 1))
        out_BLHD[b, :, h] = F.scaled_dot_product_attention(q_BHLD[head], k_BHSD[head], v_BHSD[head])[0, 0]
    return out_BLHD.flatten(2)


def _extended_factors(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, L or S, W], whose further columns make the shift and the sums.

    In these columns each key and value has a one, in turns in the first, the second and so on, and each query its
    shift. So every logit gets its row's shift, and the values' products there are the sums of the exponentials: each
    column's over a part of the keys, so that their roundings to bfloat16 average out.
    """
    width, keys = q_BHLD.shape[-1], k_BHSD.shape[2]
    spare = _COLUMN_MULTIPLE - width % _COLUMN_MULTIPLE
    q_BHLW = q_BHLD.new_empty(*q_BHLD.shape[:3], width + spare)
    k_BHSW, v_BHSW = extended = k_BHSD.new_empty(2, *k_BHSD.shape[:3], width + spare)
    torch.mul(q_BHLD, 1 / math.sqrt(width), out=q_BHLW[..., :width])
    q_BHLW[..., width:] = _shifts(q_BHLW[..., :width], k_BHSD)
    k_BHSW[..., :width], v_BHSW[..., :width] = k_BHSD, v_BHSD
    extended[..., width:] = torch.eye(spare, dtype=q_BHLD.dtype).repeat(keys // spare + 1, 1)[:keys]
    return q_BHLW, k_BHSW, v_BHSW


def _shifts(q_BHLD: Tensor, k_BHSD: Tensor) -> Tensor:
    """What to add to each row's logits, by their mean and deviation over a sample of the keys -> [B, H, L, 1]."""
    keys = k_BHSD.shape[2]
    stride = keys // _SAMPLED_KEYS | 1  # odd, to meet every column of a picture
    logits = q_BHLD @ k_BHSD[:, :, ::stride].mT
    mean = logits.mean(-1, keepdim=True, dtype=torch.float32)
    norm = torch.linalg.vector_norm(logits, dim=-1, keepdim=True, dtype=torch.float32)
    deviation = (norm.square_() / logits.shape[-1] - mean.square()).clamp_(min=0).sqrt_()
    return mean.neg_().sub_(_SUM_SLOPE * deviation).add_(_AIM - math.log(keys))


def _attend(q_LW: Tensor, k_SW: Tensor, v_SW: Tensor, out_LW: Tensor) -> None:
    """Writes the sums of one head's values, each weighted by the exponential of its logit."""
    rows = max(_BLOCK_LOGITS // len(k_SW), 1)
    for q, out in zip(torch.split(q_LW, rows), torch.split(out_LW, rows), strict=True):
        torch.mm(packed_linear(q, k_SW, activation="sigmoid"), v_SW, out=out)


def _heads_with_wrong_shift(sums_BHL1: Tensor) -> list[list[int]]:
    """The places [b, h] of heads of which a row's sum shows that the shift was wrong for it."""
    smallest, largest = sums_BHL1.flatten(2).aminmax(dim=2)
    is_right = (smallest > _SMALLEST_SUM) & (largest < _LARGEST_SUM)
    places: list[list[int]] = (~is_right).nonzero().tolist()
    return places
