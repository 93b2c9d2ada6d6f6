"""Requests to single stages, valid as they are; a test changes the field it is about."""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.v1.decoder_service_pb2 import DecodeRequest
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.tensor_pb2 import Conditioning, NamedTensor, TensorRef
from safelight.v1.work_pb2 import (
    DETERMINISM_CLASS_EXACT,
    Checkpoint,
    CheckpointOptions,
    GuidanceOptions,
    SamplingOptions,
)
from services.modeling.wire import TorchPayload, make_header
from tests.support.tiny_sd15 import WIDTH


def inline(tensor: Tensor) -> TensorRef:
    """A tensor by value."""
    return TensorRef(header=make_header(tensor), inline=bytes(TorchPayload(tensor).buffer()))


def conditioning(seed: int, tokens: int = 8) -> Conditioning:
    """Random prompt embeddings."""
    embeds = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Conditioning(tensors=[NamedTensor(name="prompt_embeds", tensor=inline(embeds))])


def denoise_request(*, seed: int = 0, steps: int = 4, scale: float = 5.0, sampler: str = "euler") -> DenoiseRequest:
    """A small latent of the tiny model."""
    return DenoiseRequest(
        model="tiny",
        conditioning=conditioning(seed),
        negative_conditioning=conditioning(seed + 1000),
        latent_shape=[4, 8, 8],
        sampling=SamplingOptions(sampler=sampler, steps=steps),
        guidance=GuidanceOptions(scale=scale),
        seed=seed,
    )


def exact(request: DenoiseRequest) -> DenoiseRequest:
    """The request in the exact class."""
    changed = DenoiseRequest()
    changed.CopyFrom(request)
    changed.determinism = DETERMINISM_CLASS_EXACT
    return changed


def with_checkpoints(request: DenoiseRequest, every_steps: int) -> DenoiseRequest:
    """The request, to be answered with checkpoints; 0: as often as the denoiser finds right."""
    changed = DenoiseRequest()
    changed.CopyFrom(request)
    changed.checkpoints.CopyFrom(CheckpointOptions(every_steps=every_steps))
    return changed


def resumed(request: DenoiseRequest, checkpoint: Checkpoint) -> DenoiseRequest:
    """The request, to be gone on with from a checkpoint."""
    changed = DenoiseRequest()
    changed.CopyFrom(request)
    changed.resume_from.CopyFrom(checkpoint)
    return changed


def from_picture(
    request: DenoiseRequest, picture: Tensor, strength: float, mask: Tensor | None = None
) -> DenoiseRequest:
    """The request, to be begun with a picture's latent [1, C, H, W]; mask: [1, 1, H, W], 1 where to repaint."""
    changed = DenoiseRequest()
    changed.CopyFrom(request)
    changed.initial_latents.CopyFrom(inline(picture))
    changed.strength = strength
    if mask is not None:
        changed.mask.CopyFrom(inline(mask))
    return changed


def decode_request(latents: Tensor) -> DecodeRequest:
    """A latent to decode with the tiny model."""
    return DecodeRequest(model="tiny", latents=inline(latents))
