"""Attention to some of the keys, in a form that can be merged with attention to others.

The softmax of a row of logits needs the sum of their exponentials over all keys. Attention to a part of them keeps its
logarithm beside the output; two parts then make the whole, exactly (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867). torch's fused kernels compute it anyway but return it only from the operators below
`scaled_dot_product_attention`.

Shapes: B batch, H heads, L queries, S keys, D channels of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

_FLASH_CHANNELS = 8  # the flash kernel wants a multiple of them


@dataclass(frozen=True)
class PartialAttention:
    """What queries took of a part of the keys.

    output: [B, H, L, D], softmax-weighted values of that part; float32 once merged.
    logsumexp: [B, H, L] float32, of the logits.
    """

    output: Tensor
    logsumexp: Tensor

    def merged(self, other: "PartialAttention") -> "PartialAttention":
        """Attention to the keys of both, in float32."""
        share = torch.sigmoid(other.logsumexp - self.logsumexp)[..., None]  # e^b / (e^a + e^b)
        output = torch.lerp(self.output.float(), other.output.float(), share)
        return PartialAttention(output, torch.logaddexp(self.logsumexp, other.logsumexp))


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> PartialAttention:
    """Attention to these keys, by the fastest kernel that there is. q: [B, H, L, D], k and v: [B, H, S, D] with S > 0.

    Not measured on CUDA.
    """
    if q.numel() == 0:  # the CPU's kernel divides by the number of queries
        return PartialAttention(q, q.new_empty(q.shape[:3], dtype=torch.float32))
    if q.device.type == "cpu":
        return PartialAttention(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v))
    if q.device.type == "cuda":
        asked = SDPAParams(q, k, v, None, 0.0, False, False)
        if can_use_flash_attention(asked) and q.shape[3] % _FLASH_CHANNELS == 0:
            return PartialAttention(*torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2])
        if can_use_efficient_attention(asked):
            output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
            return PartialAttention(output, logsumexp[..., : q.shape[2]])  # padded to a multiple of 32
    return plain_partial_attention(q, k, v)


def plain_partial_attention(q: Tensor, k: Tensor, v: Tensor) -> PartialAttention:
    """The same by its definition, with the logits in memory; for devices without a kernel."""
    logits = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    return PartialAttention(torch.softmax(logits, dim=-1).to(v.dtype) @ v, torch.logsumexp(logits, dim=-1))
