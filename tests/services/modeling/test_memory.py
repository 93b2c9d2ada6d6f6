"""Laws of running out of memory: it is told from other errors on every kind of device."""

from __future__ import annotations

import pytest
import torch

from services.modeling.memory import is_out_of_memory


def test_an_allocation_that_the_cpu_has_no_room_for_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=["host", "GPU"])
def test_the_errors_made_for_it_are_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_another_error_is_not() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
