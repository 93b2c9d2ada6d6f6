"""Settings of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from services.common.settings import StageSettings, setting


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(StageSettings):
    """What the denoiser takes beside every stage's settings."""

    service: ClassVar[str] = "denoiser"

    max_running: int = setting(16, "Requests between their first and last step; the others wait.")
    max_batch_rows: int = setting(8, "Rows of a forward pass; a request with guidance has two.")
    batch_cfg: bool = setting(True, "Run the prompt's and the negative prompt's rows in one forward pass.")
    max_latent_area: int = setting(65536, "Most latent elements of a plane; 65536 is 2048x2048 pixels at f=8.")
    max_steps: int = setting(1000, "Most steps of a request.")
