"""Our group normalisation against torch's in float64, in either memory format."""

import pytest
import torch
from torch.nn import functional as F

from services.modeling.norms import GroupNorm


def norm(dtype: torch.dtype) -> GroupNorm:
    torch.manual_seed(0)
    made = GroupNorm(4, 12, eps=1e-6)
    torch.nn.init.normal_(made.weight)
    torch.nn.init.normal_(made.bias)
    return made.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 12, 160, 130), (3, 12, 5, 7), (2, 12, 1, 1)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 3e-2)])
def test_group_norm_is_exact(
    memory_format: torch.memory_format, shape: tuple[int, ...], mean: float, dtype: torch.dtype, tolerance: float
) -> None:
    made = norm(dtype)
    x = (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=memory_format)
    expected = F.group_norm(x.double().contiguous(), 4, made.weight.double(), made.bias.double(), eps=1e-6)
    normed = made(x)
    assert normed.dtype == dtype
    assert normed.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(normed.double(), expected, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(9, 8), (90, 80)])
def test_a_picture_does_not_depend_on_its_batch(size: tuple[int, int]) -> None:
    made, x = norm(torch.float32), torch.randn(3, 12, *size).contiguous(memory_format=torch.channels_last)
    assert torch.equal(made(x)[1:2], made(x[1:2].clone(memory_format=torch.channels_last)))
