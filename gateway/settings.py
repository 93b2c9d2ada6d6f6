"""Settings of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from services.common.channels import MAX_MESSAGE_BYTES
from services.common.settings import ServerSettings, setting
from services.common.uploaded_films import MAX_FILM_BYTES


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
    max_images_in_stages: int = setting(0, "Of these, pictures that are in the stages; 0: as many as the stages take.")
    max_input_bytes: int = setting(
        512 * 1024**2, "Input files of the requests in work, in bytes; one more gets RESOURCE_EXHAUSTED."
    )
    max_film_bytes: int = setting(MAX_FILM_BYTES, "Largest film that a request may start from.")
    max_queue_seconds: float = setting(
        600.0, "Most seconds of work ahead of a request; one more gets RESOURCE_EXHAUSTED."
    )
    deadline_factor: float = setting(1.0, "A request is refused whose estimate is beyond its time times this.")
    max_attempts: int = setting(4, "Times a stage is tried for a picture, on another replica where there is one.")
    encode_seconds: float = setting(60.0, "Longest time for one encoder call.")
    decode_seconds: float = setting(120.0, "Longest silence of a decoder; then the picture is decoded elsewhere.")
    silence_seconds: float = setting(2.0, "Longest silence of a denoiser; then the picture goes on elsewhere.")
    replica_wait_seconds: float = setting(15.0, "Time that work in progress waits for a replica when none is healthy.")
    restart_wait_seconds: float = setting(
        600.0,
        "Time that work waits for a model whose processes are started again, where no other replica has it.",
    )
    checkpoint_steps: int = setting(0, "Steps between two checkpoints; 0: as often as costs at most 1 % of step time.")
    max_checkpoint_bytes: int = setting(256 * 1024**2, "Largest checkpoint kept; a larger one is left at its denoiser.")
    journal_bytes: int = setting(256 * 1024**2, "Memory for finished results that clients may still ask for.")
    journal_seconds: float = setting(120.0, "Time that a finished result is kept for its idempotency key.")
    reattach_seconds: float = setting(5.0, "Time that work with an idempotency key goes on when its calls are lost.")

    @property
    def max_message_bytes(self) -> int:
        """A film comes, and is passed on, in one message."""
        return self.max_film_bytes + MAX_MESSAGE_BYTES
