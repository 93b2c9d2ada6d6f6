"""GGUF files as checkpoints: what the `gguf` package wrote is read back, and what is wrong is told."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.gguf_layout import save_gguf

MATRIX = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# Bytes of a block and where its float16 factors lie: the package reads K-quants and does not write them.
K_QUANTS = {
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}


def save_raw(path: Path, data: np.ndarray, quantization: GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("matrix", data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_was_written_is_read(tmp_path: Path, name: str) -> None:
    expected = save_gguf(tmp_path / "x.gguf", {"matrix": MATRIX, "vector": MATRIX[0]}, GGMLQuantizationType[name])
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.keys() == expected.keys()
    for key, tensor in expected.items():
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(key).float(), tensor)


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_are_dequantized(tmp_path: Path, name: str) -> None:
    size, factors = K_QUANTS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (6, size), dtype=np.uint8)
    for place in factors:
        blocks[:, place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    checkpoint = open_checkpoint(save_raw(tmp_path / "k.gguf", blocks, GGMLQuantizationType[name]))
    expected = torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType[name]))
    assert checkpoint.shape("matrix") == (6, 256)
    assert torch.equal(checkpoint.tensor("matrix"), expected)
    assert expected.isfinite().all()
    assert expected.std() > 0


def test_the_fingerprint_sees_the_type_and_the_bytes(tmp_path: Path) -> None:
    def fingerprint(name: str, matrix: torch.Tensor, quantization: str) -> str:
        save_gguf(tmp_path / name, {"matrix": matrix}, GGMLQuantizationType[quantization])
        return open_checkpoint(tmp_path / name).fingerprint

    first = fingerprint("a.gguf", MATRIX, "Q8_0")
    assert first == fingerprint("b.gguf", MATRIX, "Q8_0")
    assert len({first, fingerprint("c.gguf", MATRIX, "F16"), fingerprint("d.gguf", MATRIX + 1, "Q8_0")}) == 3


def test_files_of_both_formats_make_one_checkpoint(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf", {"first": MATRIX, "both": MATRIX}, GGMLQuantizationType.F32)
    save_gguf(tmp_path / "b.gguf", {"second": MATRIX, "both": -MATRIX}, GGMLQuantizationType.F32)
    checkpoint = open_checkpoint([tmp_path / "a.gguf", tmp_path / "b.gguf"])
    assert sorted(checkpoint) == ["both", "first", "second"]
    assert torch.equal(checkpoint.tensor("both"), -MATRIX)


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 3000, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    save_gguf(tmp_path / "x.gguf", {"matrix": MATRIX}, GGMLQuantizationType.F32)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is not a whole GGUF file"):
        open_checkpoint(tmp_path / "cut.gguf")


def test_an_unknown_tensor_type_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", {"matrix": MATRIX}, GGMLQuantizationType.F32)
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    after_name_and_shape = content.index(b"matrix") + len(b"matrix") + 4 + 2 * 8
    content[after_name_and_shape] = 99
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"known tensor types .*99"):
        open_checkpoint(tmp_path / "x.gguf")


def test_a_type_that_cannot_be_dequantized_is_refused_by_name(tmp_path: Path) -> None:
    blocks = np.zeros((6, 40), dtype=np.uint8)
    checkpoint = open_checkpoint(save_raw(tmp_path / "x.gguf", blocks, GGMLQuantizationType.Q8_1))
    with pytest.raises(CheckpointError, match="matrix is of type Q8_1"):
        checkpoint.tensor("matrix")
