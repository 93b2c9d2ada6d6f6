"""What sampling has to know of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.denoiser.sampling.noise_process import NoiseProcess


@dataclass(frozen=True, kw_only=True)
class ModelSampling:
    """How a model's latents are noised, and which samplers and schedules suit it.

    noise: the process that it was trained with.
    samplers: names in SAMPLERS; the first is the default.
    schedules: names in SCHEDULES, each with the model's own values for its parameters; the first is the default.
    ays_timesteps: the noise levels that "Align Your Steps" found for it, as timesteps from first to last.
    elements_per_token: elements of a latent's planes that one token of the network stands for; schedules whose shift
        follows the size of the latent count tokens.
    """

    noise: NoiseProcess
    samplers: tuple[str, ...]
    schedules: Mapping[str, Mapping[str, float]]
    ays_timesteps: tuple[int, ...] = ()
    elements_per_token: int = 1
