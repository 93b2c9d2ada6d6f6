"""What is packed comes out the same: every dtype bit for bit, in memory of its own."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from services.denoiser.ranks.messages import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_tensors_come_out_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (10 * torch.randn(shape)).to(dtype)
    (found,) = unpack(pack([tensor]))
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, tensor)


def test_a_part_of_a_tensor_is_all_that_travels() -> None:
    rows = torch.randn(1000, 1000)
    assert sum(map(len, pack(rows[:, :2]))) < 10_000
    assert torch.equal(unpack(pack(rows.T[3:5])), rows.T[3:5])


def test_read_only_mappings_stay_what_they_are() -> None:
    assert unpack(pack(MappingProxyType({"shift": 3.0}))) == MappingProxyType({"shift": 3.0})
