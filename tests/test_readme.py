"""The README's table of settings is that of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.settings import GatewaySettings
from services.common.settings import ServerSettings, StageSettings, environment_name, setting_fields
from services.decoder.settings import DecoderSettings
from services.denoiser.settings import DenoiserSettings
from services.encoder.settings import EncoderSettings
from services.modeling.lora.settings import AdapterSettings

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMON = {each.name for each in setting_fields(ServerSettings)}
STAGE = {each.name for each in setting_fields(StageSettings)} - COMMON
ADAPTERS = {each.name for each in setting_fields(AdapterSettings)} - STAGE - COMMON


def rows(settings: type[ServerSettings], left_out: set[str]) -> list[str]:
    """The table's rows of a settings class."""
    return [
        f"| `{each.name}` | {_shown(each.default)} | {each.metadata['help']} |"
        for each in setting_fields(settings)
        if each.name not in left_out
    ]


def _shown(default: object) -> str:
    return f"`{default}`" if default not in ("", ()) else ""


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        (ServerSettings, set()),
        (StageSettings, COMMON),
        (AdapterSettings, COMMON | STAGE),
        (EncoderSettings, COMMON | STAGE | ADAPTERS),
        (DenoiserSettings, COMMON | STAGE | ADAPTERS),
        (DecoderSettings, COMMON | STAGE),
        (GatewaySettings, COMMON),
    ],
)
def test_the_table_of_settings_is_that_of_the_code(settings: type[ServerSettings], left_out: set[str]) -> None:
    table = "\n".join(rows(settings, left_out))
    assert table in README


def test_the_environment_variable_that_the_readme_explains_exists() -> None:
    assert environment_name(EncoderSettings, "lease_seconds") in README
