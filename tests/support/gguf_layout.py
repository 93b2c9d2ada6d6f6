"""GGUF files, written by the tests with the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor


def save_gguf(path: Path, tensors: Mapping[str, Tensor], quantization: GGMLQuantizationType) -> dict[str, Tensor]:
    """Write what makes whole blocks quantized and the rest in float32, as converters do.

    Returns what a reader must make of them.
    """
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    writer = gguf.GGUFWriter(path, "test")
    read = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        in_blocks = tensor.ndim > 1 and tensor.shape[-1] % block == 0
        kind = quantization if in_blocks else GGMLQuantizationType.F32
        data = gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        read[name] = torch.from_numpy(gguf.dequantize(data, kind)).reshape(tensor.shape).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read
