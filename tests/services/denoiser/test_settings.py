"""Laws of the denoiser's settings: what can't be is refused by name."""

from __future__ import annotations

import pytest

from services.common.settings import SettingsError
from services.denoiser.settings import DenoiserSettings, parse_tenant_weights


def test_weights_are_read_by_tenant() -> None:
    assert parse_tenant_weights(["alice=2", "a=b=0.5"]) == {"alice": 2.0, "a=b": 0.5}


@pytest.mark.parametrize(
    "entry", ["alice", "=2", "alice=", "alice=two", "alice=0", "alice=-1", "alice=inf", "alice=nan"]
)
def test_an_entry_that_is_no_weight_is_refused_by_name(entry: str) -> None:
    with pytest.raises(SettingsError, match="tenant_weights") as caught:
        parse_tenant_weights([entry])
    assert entry in str(caught.value)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_heart_that_never_rests_is_refused_by_name(seconds: float) -> None:
    with pytest.raises(SettingsError, match="heartbeat_seconds"):
        DenoiserSettings(heartbeat_seconds=seconds)
