"""Small pictures of a request in progress: a linear map from the denoised prediction to colours, no decoder needed.

The map is fitted once for each VAE by examples/fit_latent_preview.py and lies beside the model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
from services.modeling.components import read_json

FILE_NAME = "latent_preview.json"
MEDIA_TYPE = "image/jpeg"
_QUALITY = 90


@dataclass(frozen=True, eq=False)
class LatentPreviewMap:
    """Colour = matrix @ latent + bias, for each latent element; colours from 0 to 1.

    Args:
        matrix: float32 [3, C].
        bias: float32 [3].
    """

    matrix: Tensor
    bias: Tensor

    def picture(self, denoised: Tensor) -> bytes:
        """A JPEG file, a pixel for each latent element, of a prediction [1, C, H, W] on any device."""
        colours = torch.einsum("rc,chw->hwr", self.matrix, denoised[0].to("cpu", torch.float32)) + self.bias
        pixels = (colours * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
        return file.getvalue()


def preview_map_of(entry: ModelEntry, latent_channels: int) -> LatentPreviewMap | None:
    """The map that the manifest names, or the one in the model's folder; None: neither.

    Raises:
        CheckpointError: there is no such file, or it is no map for latents of so many channels.
    """
    if not entry.latent_preview:
        return load_preview_map(entry.paths[0] / FILE_NAME, latent_channels)
    named = load_preview_map(Path(entry.latent_preview), latent_channels)
    if named is None:
        raise CheckpointError(f"model {entry.name!r}: {entry.latent_preview} does not exist: correct latent_preview")
    return named


def load_preview_map(path: Path, latent_channels: int) -> LatentPreviewMap | None:
    """The map in a file; None when there is no such file.

    Raises:
        CheckpointError: the file is no map for latents of so many channels.
    """
    content = read_json(path)
    if content is None:
        return None
    try:
        matrix = torch.tensor(content["matrix"], dtype=torch.float32)
        bias = torch.tensor(content["bias"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: has no numbers 'matrix' and 'bias': fit it again", file=str(path)) from error
    shapes = tuple(matrix.shape), tuple(bias.shape)
    if shapes != ((3, latent_channels), (3,)) or not bool(matrix.isfinite().all() and bias.isfinite().all()):
        raise CheckpointError(
            f"{path}: matrix and bias have the shapes {shapes}; must be finite, (3, {latent_channels}) and (3,): fit "
            "it again for this model's VAE",
            file=str(path),
        )
    return LatentPreviewMap(matrix, bias)
