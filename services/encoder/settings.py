"""Settings of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from services.common.settings import setting
from services.modeling.lora.settings import AdapterSettings


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(AdapterSettings):
    """What the encoder takes beside every stage's settings."""

    service: ClassVar[str] = "encoder"

    max_batch_prompts: int = setting(32, "Prompts of a forward pass.")
    batch_wait_seconds: float = setting(0.002, "Time that the first prompt of a batch waits for others.")
    cache_bytes: int = setting(256 * 1024**2, "Memory for embeddings of earlier prompts; 0 turns the cache off.")
    max_prompt_bytes: int = setting(64 * 1024, "Largest prompt, in UTF-8 bytes.")
