"""Attention equals torch's own, whichever way it is computed."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from services.modeling import attention as module
from services.modeling.attention import attention
from services.modeling.packing import can_pack

HEADS, WIDTH = 2, 40

needs_packed_bfloat16 = pytest.mark.skipif(
    not can_pack("cpu", torch.bfloat16), reason="this CPU has no packed bfloat16 products"
)


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused way is taken, also where it is the slower one."""
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: True)


def qkv(length: int, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one tensor, as a fused projection gives them; the gain is the deviation of the logits."""
    fused = torch.randn(1, length, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    q, k, v = fused.to(dtype).chunk(3, dim=-1)
    return q * gain, k, v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch_attention(q.double(), k.double(), v.double())


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("length", [7, 1100])
def test_float32_equals_float64(length: int) -> None:
    q, k, v = qkv(length, torch.float32)
    assert relative_error(attention(q, k, v, HEADS), reference(q, k, v)) < 5e-6


@needs_packed_bfloat16
@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("gain", [0.0, 0.3, 3.0])
def test_long_bfloat16_sequences_are_fused_and_right_to_rounding(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # the fused way needs no help
    q, k, v = qkv(1100, torch.bfloat16, gain)
    fused = attention(q, k, v, HEADS)
    monkeypatch.undo()
    assert relative_error(fused, reference(q, k, v)) < 1e-2


@needs_packed_bfloat16
@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("case", ["large logits", "one outlier", "not finite"])
def test_heads_out_of_the_fused_range_are_left_to_torch(case: str) -> None:
    q, k, v = qkv(1100, torch.bfloat16, 40.0 if case == "large logits" else 1.0)
    if case == "one outlier":
        k = k.clone()
        k[:, 500] = 60 * q[:, 700]
    if case == "not finite":
        q[:, 0] = torch.inf
    torch.testing.assert_close(attention(q, k, v, HEADS), torch_attention(q, k, v), rtol=0, atol=0, equal_nan=True)


@needs_packed_bfloat16
@pytest.mark.usefixtures("fast_bfloat16")
def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    first, second = qkv(1100, torch.bfloat16), qkv(1100, torch.bfloat16, 2.0)
    q, k, v = (torch.cat(pair) for pair in zip(first, second, strict=True))
    together = attention(q, k, v, HEADS)
    assert torch.equal(together[:1], attention(*first, HEADS))


def test_torch_computes_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: False)
    q, k, v = qkv(1100, torch.bfloat16)
    assert torch.equal(attention(q, k, v, HEADS), torch_attention(q, k, v))
