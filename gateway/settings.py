"""Settings of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from services.common.settings import ServerSettings, setting


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServerSettings):
    """What the gateway takes beside every server's settings."""

    service: ClassVar[str] = "gateway"

    encoders: tuple[str, ...] = setting(
        (), "Encoder replicas: host:port, unix:/path, or dns:///name:port (all its addresses)."
    )
    denoisers: tuple[str, ...] = setting((), "Denoiser replicas, written the same way.")
    decoders: tuple[str, ...] = setting((), "Decoder replicas, written the same way.")
    health_interval_seconds: float = setting(1.0, "Time between two looks at every replica.")
    max_images_in_flight: int = setting(256, "Pictures in work at once; one more gets RESOURCE_EXHAUSTED.")
    max_attempts: int = setting(4, "Times a stage is tried for a picture, on another replica where there is one.")
    encode_seconds: float = setting(60.0, "Longest time for one encoder call.")
