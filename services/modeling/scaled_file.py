"""Files whose eight-bit matrices have scales beside them: ComfyUI's "fp8_scaled" of FLUX.1, T5, UMT5 and Wan.

`<layer>.weight`, float8_e4m3fn, stands for itself times `<layer>.scale_weight` (or `weight_scale`), one number or one
for each row. `scale_input` is for kernels that compute in eight bits, which ours don't; a tensor `scaled_fp8` marks the
file. See `comfy/ops.py` of https://github.com/comfyanonymous/ComfyUI.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from safelight.errors import CheckpointError
from services.modeling.mapped_memory import release_mapped
from services.modeling.tensor_file import Shape, TensorFile

_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = (*_SCALES, ".scale_input", ".input_scale", "scaled_fp8")


class ScaledFile:
    """A file seen as if its matrices had been multiplied with their scales; for files without scales, the same."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        names = file.keys()
        self._scales = {f"{name.rpartition('.')[0]}.weight": name for name in names if name.endswith(_SCALES)}
        self._names = [name for name in names if not name.endswith(_BESIDE)]

    def keys(self) -> Collection[str]:
        return self._names

    def metadata(self) -> Mapping[str, str]:
        return self._file.metadata()

    def shape(self, name: str) -> Shape:
        return self._file.shape(name)

    def tensor(self, name: str) -> Tensor:
        """As the file has it; in float32 what has a scale.

        Raises:
            CheckpointError: the scale does not fit.
        """
        tensor = self._file.tensor(name)
        if name not in self._scales:
            return tensor
        scale, rows = self._file.tensor(self._scales[name]).float(), len(tensor)
        if scale.numel() not in (1, rows):
            raise CheckpointError(
                f"{self._scales[name]} has {scale.numel()} numbers; {name}, {list(tensor.shape)}, takes 1 or {rows}"
            )
        scaled = tensor.to(torch.float32).mul_(scale.view(-1, *[1] * (tensor.ndim - 1)))
        release_mapped(tensor)
        return scaled

    def stored(self, name: str) -> tuple[str, Tensor]:
        return self._file.stored(name)
