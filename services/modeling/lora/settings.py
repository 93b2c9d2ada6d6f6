"""Settings of stages whose models take LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.settings import StageSettings, setting


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(StageSettings):
    """How many LoRAs a replica holds."""

    max_adapters: int = setting(64, "LoRAs that may be loaded, of all models together.")
    max_adapter_bytes: int = setting(4 * 1024**3, "Most memory for loaded LoRAs.")
