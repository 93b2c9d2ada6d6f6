"""Whether a CPU multiplies bfloat16 matrices faster than float32 ones.

Not every CPU that has instructions for it does. AMD's Zen 4 and Intel's with AMX gain by a factor of two and more.
Intel's with AVX512_BF16 but without AMX (many virtual machines hide it) take twice as long as in float32, and CPUs
without such instructions convert every number. Names and flags don't tell these apart, so it is measured.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn import functional as F

_ROWS, _WIDTH_IN, _WIDTH_OUT = 512, 1280, 320  # 0.4 GFLOP: milliseconds
_ROUNDS = 5


@cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU's products take no longer in bfloat16 than in float32; measured once, in a tenth of a second.

    The two differ by a factor of about two either way, and only the time that this thread ran is counted, so that
    what else the machine does can't turn the answer.
    """
    rounds = [(_product_seconds(torch.float32), _product_seconds(torch.bfloat16)) for _ in range(_ROUNDS)]
    return min(bfloat16 for _, bfloat16 in rounds) <= min(float32 for float32, _ in rounds)


def _product_seconds(dtype: torch.dtype) -> float:
    """How long this thread computes its share of one product."""
    x, weight = torch.ones(_ROWS, _WIDTH_IN, dtype=dtype), torch.ones(_WIDTH_OUT, _WIDTH_IN, dtype=dtype)
    started = time.thread_time()
    F.linear(x, weight)
    return time.thread_time() - started
