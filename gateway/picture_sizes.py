"""Which sizes of a picture a model draws, in pixels."""

from __future__ import annotations

from safelight.v1.model_pb2 import ModelDescription

MIN_PIXELS = 64
"""Shortest side."""


def size_multiple(model: ModelDescription) -> int:
    """What a width and a height must be multiples of."""
    return model.decoder.scale_factor * max(model.denoiser.latent_multiple, 1)


def largest_area(model: ModelDescription) -> int:
    """Most pixels in all."""
    return model.denoiser.max_latent_area * model.decoder.scale_factor**2
