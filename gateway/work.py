"""Pieces of work: what a request asks of one replica of each stage, in the units that stages measure their costs in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from safelight.v1.decoder_service_pb2 import DecodeRequest
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, Adapter
from services.common.strength import steps_run


@dataclass(frozen=True)
class Work:
    """A piece of work for one replica.

    Args:
        model: name of the model.
        latent_shape: extents of the latent without its batch axis, of its plane alone where a picture is encoded; empty
            at the encoder.
        rows: rows that it takes of a batch.
        passes: forward passes, one after the other: the denoiser's model calls; 1 elsewhere.
        adapters: fingerprints of the LoRAs that the replica must have, by name.
    """

    model: str
    latent_shape: tuple[int, ...] = ()
    rows: int = 1
    passes: int = 1
    adapters: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def size(self) -> float:
        """What its time grows with, where nothing has been measured: elements times rows times passes."""
        return float(math.prod(self.latent_shape) * self.rows * self.passes)


def encode_work(request: EncodeRequest) -> Work:
    """A batch of prompts."""
    return Work(request.model, rows=len(request.prompts), adapters=_needed(request.adapters))


def encode_image_work(model: str, latent_shape: tuple[int, ...]) -> Work:
    """A picture to encode to a latent [C, H, W], or a film to [C, T, H, W]; decoders measure it by the plane, once for
    each latent frame, apart from latents to decode."""
    return Work(model, latent_shape[-2:], passes=math.prod(latent_shape[1:-2]))


def denoise_work(request: DenoiseRequest, calls_per_step: int = 1) -> Work:
    """The steps that are left, of a sampler with so many model calls a step."""
    exact = request.determinism == DETERMINISM_CLASS_EXACT
    strength = request.strength if request.HasField("strength") else 1.0
    steps = steps_run(request.sampling.steps, strength) - request.resume_from.step
    calls = model_calls(steps, calls_per_step)
    work = steps_work(request.model, tuple(request.latent_shape), calls, request.guidance.scale, exact)
    return replace(work, adapters=_needed(request.adapters))


def model_calls(steps: int, calls_per_step: int) -> int:
    """Of the last steps of a schedule; the very last one, to sigma 0, takes one call by every sampler."""
    return calls_per_step * (steps - 1) + 1


def steps_work(model: str, latent_shape: tuple[int, ...], calls: int, scale: float, exact: bool) -> Work:
    """Model calls in turn: guidance takes a second row, and in the exact class each row has a pass of its own."""
    rows = 2 if scale > 1 else 1
    return Work(model, latent_shape, 1, calls * rows) if exact else Work(model, latent_shape, rows, calls)


def decode_work(request: DecodeRequest) -> Work:
    """A latent."""
    return Work(request.model, tuple(request.latents.header.shape[1:]))


def _needed(adapters: Iterable[Adapter]) -> dict[str, str]:
    """Fingerprints by name."""
    return {adapter.name: adapter.fingerprint for adapter in adapters}
