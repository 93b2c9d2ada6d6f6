"""The random numbers of one request."""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSource:
    """The sequence of standard normal tensors that a seed stands for; draw 0 is the initial latent's noise.

    Drawn on the CPU in float32 from a generator of the request's own, so neither the device nor the other requests of
    a batch change them. Draw 0 equals `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        """seed: any 64-bit integer. shape: that of the latents, leading 1 included, such as (1, 4, 64, 64)."""
        self._seed = seed
        self._shape = shape
        self._rewind()

    def draw(self, index: int) -> Tensor:
        """The draw number `index`, float32 on the CPU; a function of (seed, shape, index) alone.

        In order it costs one draw; out of order (a request resumed here) also the draws before it.
        """
        if index < self._position:
            self._rewind()
        for _ in range(self._position, index):
            self._next()
        return self._next()

    def _rewind(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(self._seed)
        self._position = 0

    def _next(self) -> Tensor:
        self._position += 1
        return torch.randn(self._shape, generator=self._generator, dtype=torch.float32)
