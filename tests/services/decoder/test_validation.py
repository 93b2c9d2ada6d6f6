from __future__ import annotations

from typing import Any

import pytest

from safelight.errors import InvalidRequestError
from safelight.v1.decoder_service_pb2 import EncodeFilmRequest
from safelight.v1.model_pb2 import DecoderDescription
from services.decoder.validation import FilmLimits, check_encode_film

MODEL = DecoderDescription(scale_factor=8, latent_channels=16, frames_per_latent=4)
LIMITS = FilmLimits(max_bytes=100, max_frames=1025, max_frame_pixels=1024 * 1024)


def _request(**fields: Any) -> EncodeFilmRequest:
    return EncodeFilmRequest(**{"keyframes": [b"x"], "width": 64, "height": 48, "num_frames": 9, **fields})


@pytest.mark.parametrize("fields", [{}, {"film": b"x", "keyframes": []}, {"num_frames": 1}, {"keyframes": [b"x"] * 9}])
def test_a_film_that_fits_is_let_through(fields: dict[str, Any]) -> None:
    check_encode_film(_request(**fields), MODEL, LIMITS)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_frames": 10}, "num_frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": -3}, "num_frames"),
        ({"num_frames": 10_001}, "num_frames"),
        ({"width": 60}, "width"),
        ({"height": 0}, "width"),
        ({"width": -8}, "width"),
        ({"width": 16_000, "height": 16_000}, "width"),
        ({"keyframes": []}, "film"),
        ({"keyframes": [b"x"] * 10}, "keyframes"),
        ({"film": b"x"}, "film"),
        ({"film": b"x" * 101, "keyframes": []}, "film"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_encode_film(_request(**fields), MODEL, LIMITS)
    assert [violation.field for violation in caught.value.violations] == [field]
