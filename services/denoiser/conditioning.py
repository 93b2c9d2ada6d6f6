"""What a request tells the model beside its latents and timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1.work_pb2 import SizeConditioning
from services.denoiser.keyframes import Keyframes


@dataclass(frozen=True)
class PromptConditioning:
    """One prompt of a request, and what the request tells the model with either prompt.

    Args:
        tensors: the prompt's named tensors, as the encoder made them.
        field: names the prompt in errors: "conditioning" or "negative_conditioning".
        latent_shape: [C, H, W] of the latent that is drawn, of a film [C, T, H, W].
        distilled_scale: guidance scale that a distilled model takes as an input; None: the model's default.
        sizes: that the model is told; None: those of the latent.
        keyframes: pictures that the film is led through; None: none.
    """

    tensors: Mapping[str, Tensor]
    field: str
    latent_shape: tuple[int, ...]
    distilled_scale: float | None = None
    sizes: SizeConditioning | None = None
    keyframes: Keyframes | None = None


def checked_tensor(conditioning: PromptConditioning, name: str, axes: int, width: int) -> Tensor:
    """A tensor of the conditioning: [1, width], or [1, tokens, width] with three axes.

    Raises:
        InvalidRequestError: it is missing or of another shape.
    """
    tensor = conditioning.tensors.get(name)
    if tensor is None or tensor.ndim != axes or tensor.shape[0] != 1 or tensor.shape[-1] != width:
        found = "missing" if tensor is None else f"{list(tensor.shape)}"
        shape = f"[1, {width}]" if axes == 2 else f"[1, tokens, {width}]"
        raise InvalidRequestError.of(
            f"{conditioning.field}.{name}",
            f"must be a tensor of shape {shape}, is {found}: use this model's own encoder",
        )
    return tensor
