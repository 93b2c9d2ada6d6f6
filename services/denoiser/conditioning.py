"""What a request tells the model beside its latents and timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from safelight.v1.work_pb2 import SizeConditioning


@dataclass(frozen=True)
class PromptConditioning:
    """One prompt of a request, and what the request tells the model with either prompt.

    Args:
        tensors: the prompt's named tensors, as the encoder made them.
        field: names the prompt in errors: "conditioning" or "negative_conditioning".
        latent_shape: [C, H, W] of the latent that is drawn.
        distilled_scale: guidance scale that a distilled model takes as an input; None: the model's default.
        sizes: that the model is told; None: those of the latent.
    """

    tensors: Mapping[str, Tensor]
    field: str
    latent_shape: tuple[int, ...]
    distilled_scale: float | None = None
    sizes: SizeConditioning | None = None
