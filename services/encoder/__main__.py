"""`python -m services.encoder`: the encoder in a process of its own."""

from __future__ import annotations

from services.common.stage import run_stage
from services.encoder.service import build_encoder
from services.encoder.settings import EncoderSettings

if __name__ == "__main__":
    run_stage(EncoderSettings, build_encoder)
