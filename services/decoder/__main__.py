"""`python -m services.decoder`: the decoder in a process of its own."""

from __future__ import annotations

from services.common.stage import run_stage
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings

if __name__ == "__main__":
    run_stage(DecoderSettings, build_decoder)
