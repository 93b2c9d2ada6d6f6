"""Requests to single stages, valid as they are; a test changes the field it is about."""

from __future__ import annotations

from collections.abc import Sequence

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
from tests.support.tiny_wan import IMAGE_TOKENS, IMAGE_WIDTH, TEXT_WIDTH

FILM_SHAPE = (16, 3, 4, 6)


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


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def led_request(
    model: str = "led", indices: Sequence[int] = (0, 8), latents: Tensor | None = None, pictures: int | None = None
) -> DenoiseRequest:
    """A small film of a tiny Wan that is led through keyframes; pictures: how many it is told the embeddings of."""
    shown = len(indices) if pictures is None else pictures
    return DenoiseRequest(
        model=model,
        conditioning=_of_words_and_pictures(1, shown),
        negative_conditioning=_of_words_and_pictures(2, shown),
        latent_shape=FILM_SHAPE,
        sampling=SamplingOptions(steps=4),
        guidance=GuidanceOptions(scale=3.0),
        keyframe_latents=inline(random(1, *FILM_SHAPE, seed=3) if latents is None else latents),
        keyframe_indices=indices,
    )


def _of_words_and_pictures(seed: int, pictures: int) -> Conditioning:
    tensors = {"prompt_embeds": random(1, 8, TEXT_WIDTH, seed=seed)}
    if pictures:
        tensors["image_embeds"] = random(1, pictures * IMAGE_TOKENS, IMAGE_WIDTH, seed=7)
    return Conditioning(tensors=[NamedTensor(name=name, tensor=inline(each)) for name, each in tensors.items()])


def decode_request(latents: Tensor) -> DecodeRequest:
    """A latent to decode with the tiny model."""
    return DecodeRequest(model="tiny", latents=inline(latents))
