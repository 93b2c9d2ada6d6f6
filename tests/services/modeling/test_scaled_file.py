"""Files whose eight-bit matrices have scales beside them stand for the products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safelight.errors import CheckpointError
from services.modeling.weights import open_checkpoint
from tests.support.scaled_layout import scaled


@pytest.mark.parametrize(
    ("scale_name", "input_name"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")]
)
@pytest.mark.parametrize("shape", [(), (1,), (6, 1)])
def test_a_matrix_is_multiplied_with_its_scale_and_nothing_else_shows(
    scale_name: str, input_name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    matrix, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    tensors = {
        "a.weight": matrix,
        f"a.{scale_name}": scale,
        f"a.{input_name}": torch.ones(()),
        "a.bias": torch.randn(6),
        "model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.keys()) == {"a.weight", "a.bias"}
    assert torch.equal(checkpoint.tensor("a.weight"), matrix.float() * scale)
    assert torch.equal(checkpoint.tensor("a.bias"), tensors["a.bias"])


def test_a_scale_of_another_length_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(6, 4), "a.scale_weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.scale_weight has 4 numbers; a\.weight, \[6, 4\], takes 1 or 6"):
        open_checkpoint(tmp_path / "a.safetensors").tensor("a.weight")


def test_the_layout_s_scales_bring_a_matrix_into_eight_bits() -> None:
    weight = 100.0 * torch.randn(8, 8)
    stored: dict[str, Tensor] = scaled({"a.weight": weight})
    assert stored["a.weight"].dtype == torch.float8_e4m3fn
    torch.testing.assert_close(stored["a.weight"].float() * stored["a.scale_weight"], weight, rtol=0.07, atol=0.5)
