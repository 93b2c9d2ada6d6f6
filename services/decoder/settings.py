"""Settings of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from services.common.channels import MAX_MESSAGE_BYTES
from services.common.settings import StageSettings, setting
from services.common.uploaded_films import MAX_FILM_BYTES, MAX_FRAME_PIXELS


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(StageSettings):
    """What the decoder takes beside every stage's settings."""

    service: ClassVar[str] = "decoder"

    tile_size: int = setting(64, "Side of a tile in latent elements.")
    tile_overlap: int = setting(16, "Latent elements that neighbouring tiles share and blend over.")
    untiled_area: int = setting(16384, "Largest latent decoded in one pass, in elements of its plane.")
    max_image_bytes: int = setting(32 * 1024**2, "Largest picture file that is read.")
    max_image_pixels: int = setting(64 * 1024**2, "Most pixels of a picture file that is read.")
    max_film_bytes: int = setting(MAX_FILM_BYTES, "Largest film file that is read.")
    max_film_frames: int = setting(1025, "Most frames of a film that is encoded.")
    max_frame_pixels: int = setting(MAX_FRAME_PIXELS, "Most pixels of a frame of a film that is read or encoded.")

    @property
    def max_message_bytes(self) -> int:
        """A film comes in one message."""
        return self.max_film_bytes + MAX_MESSAGE_BYTES
