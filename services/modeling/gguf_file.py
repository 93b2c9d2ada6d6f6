"""GGUF, the file format of llama.cpp, as one file of a checkpoint: tensors are dequantized as they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the parsing and the quantizations are the `gguf`
package's. Quantized weights save disk and download, not the memory of a loaded model.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from safelight.errors import CheckpointError
from services.modeling.mapped_memory import release_mapped

_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufFile:
    """A GGUF file, mapped into memory.

    Raises CheckpointError if it is damaged or has a tensor of an unknown type.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            # Copy on write: torch wants memory that it may write to, and the file stays as it is.
            reader = gguf.GGUFReader(file, "c")
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole GGUF file of known tensor types ({error}); it may be cut short or of another "
                "format: download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def metadata(self) -> Mapping[str, str]:
        """Nothing that anybody asks for."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self._tensors[name].shape.tolist()))  # ggml counts its dimensions from the innermost

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file for float types, else the dequantized tensor in float32.

        Raises CheckpointError for a type that can't be dequantized.
        """
        stored = self._tensors[name]
        if stored.tensor_type in _PLAIN_DTYPES:
            dtype = _PLAIN_DTYPES[stored.tensor_type]
            return torch.from_numpy(stored.data).view(dtype).reshape(self.shape(name))
        try:
            values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)).reshape(self.shape(name))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self._file}: {name} is of type {stored.tensor_type.name}, which can't be dequantized; take a file "
                "with F16, BF16, Q8_0 or K-quants"
            ) from error
        release_mapped(torch.from_numpy(stored.data))
        return values

    def stored(self, name: str) -> tuple[str, Tensor]:
        stored = self._tensors[name]
        return stored.tensor_type.name, torch.from_numpy(stored.data).reshape(-1).view(torch.uint8)
