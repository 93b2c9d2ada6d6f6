"""`python -m services.denoiser`: the denoiser in a process of its own."""

from __future__ import annotations

from services.common.stage import run_stage
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings

if __name__ == "__main__":
    run_stage(DenoiserSettings, build_denoiser)
