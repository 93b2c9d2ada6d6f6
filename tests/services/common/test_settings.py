"""Laws of settings: flags before environment before file before defaults, and a typo ends the start with its name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

from gateway.settings import GatewaySettings
from services.common.settings import (
    ServerSettings,
    SettingsError,
    StageSettings,
    environment_name,
    load_settings,
    setting,
    setting_fields,
)
from services.denoiser.settings import DenoiserSettings


@dataclass(frozen=True, kw_only=True)
class KilnSettings(ServerSettings):
    """A service with one setting of each kind."""

    service: ClassVar[str] = "kiln"

    batch_size: int = setting(4, "Pots at a time.")
    peak_degrees: float = setting(1200.0, "Hottest moment.")
    oxidise: bool = setting(False, "Let air in.")
    glazes: tuple[str, ...] = setting((), "Glazes on the shelf.")


def load(*flags: str, file: Path | None = None, **environ: str) -> KilnSettings:
    config = () if file is None else ("--config", str(file))
    return load_settings(KilnSettings, (*config, *flags), environ)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kiln.yaml"


def test_without_anything_the_defaults_hold() -> None:
    assert load() == KilnSettings()


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(file: Path) -> None:
    file.write_text("batch_size: 1\npeak_degrees: 1\nlisten: file:1\n")
    settings = load("--batch-size", "3", file=file, SAFELIGHT_KILN_BATCH_SIZE="2", SAFELIGHT_KILN_PEAK_DEGREES="2")
    assert settings == KilnSettings(batch_size=3, peak_degrees=2.0, listen="file:1")


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "YES"])
def test_words_for_true(text: str) -> None:
    assert load("--oxidise", text, SAFELIGHT_KILN_OXIDISE="false").oxidise is True


@pytest.mark.parametrize("text", ["false", "FALSE", "0", "no"])
def test_words_for_false(text: str) -> None:
    assert load(SAFELIGHT_KILN_REFLECTION=text).reflection is False


@pytest.mark.parametrize(
    ("text", "glazes"),
    [("", ()), ("ash", ("ash",)), ("ash,salt", ("ash", "salt")), (" ash , salt,", ("ash", "salt"))],
)
def test_a_list_is_separated_by_commas(text: str, glazes: tuple[str, ...]) -> None:
    assert load("--glazes", text) == load(SAFELIGHT_KILN_GLAZES=text) == KilnSettings(glazes=glazes)


def test_the_file_has_yaml_values(file: Path) -> None:
    file.write_text("batch_size: 2\npeak_degrees: 1.5e3\noxidise: yes\nglazes: [ash, salt]\nlisten: 0.0.0.0:7000\n")
    assert load(file=file) == KilnSettings(
        batch_size=2, peak_degrees=1500.0, oxidise=True, glazes=("ash", "salt"), listen="0.0.0.0:7000"
    )


def test_an_empty_file_says_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert load(file=file) == KilnSettings()


@pytest.mark.parametrize(
    ("name", "value", "noun"),
    [
        ("batch_size", "4.5", "a whole number"),
        ("batch_size", "", "a whole number"),
        ("peak_degrees", "hot", "a finite number"),
        ("peak_degrees", "nan", "a finite number"),
        ("oxidise", "maybe", "true or false"),
    ],
)
def test_a_value_that_does_not_parse_ends_with_its_name(file: Path, name: str, value: str, noun: str) -> None:
    flag, variable = f"--{name.replace('_', '-')}", environment_name(KilnSettings, name)
    file.write_text(f"{name}: '{value}'\n")
    for source, flags, environ in (
        (flag, [flag, value], {}),
        (variable, [], {variable: value}),
        (f"{file}: {name}", ["--config", str(file)], {}),
    ):
        with pytest.raises(SettingsError, match=f"^{source}: '{value}' is not {noun}$"):
            load_settings(KilnSettings, flags, environ)


def test_an_unknown_variable_of_the_service_ends_with_its_name_and_those_there_are() -> None:
    with pytest.raises(
        SettingsError, match=r"^SAFELIGHT_KILN_BACTH_SIZE is not a setting; there are .*KILN_BATCH_SIZE"
    ):
        load(SAFELIGHT_KILN_BACTH_SIZE="2")


def test_variables_of_other_services_and_programs_are_passed_over() -> None:
    assert load(SAFELIGHT_DENOISER_MAX_STEPS="2", SAFELIGHT_KILNS="2", PATH="/bin") == KilnSettings()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("bacth_size: 2", "kiln.yaml: bacth_size is not a setting; there are .*batch_size"),
        ("1: 2\nx: 3", "kiln.yaml: 1 is not a setting"),
        ("batch_size:", "kiln.yaml: batch_size: must have a value"),
        ("glazes: {ash: 1}", "kiln.yaml: glazes: must have a value, or a list of values"),
        ("batch_size: [1, 2]", "kiln.yaml: batch_size: '1,2' is not a whole number"),
        ("- batch_size", "kiln.yaml: must be a mapping"),
        ("batch_size: [", "kiln.yaml: can't be read"),
    ],
)
def test_a_bad_file_ends_with_its_name_and_the_place(file: Path, content: str, sentence: str) -> None:
    file.write_text(content)
    with pytest.raises(SettingsError, match=sentence):
        load(file=file)


def test_a_file_that_is_not_there_or_is_no_text_ends_with_its_name(file: Path) -> None:
    with pytest.raises(SettingsError, match=r"--config .*kiln\.yaml: can't be read"):
        load(file=file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"--config .*kiln\.yaml: can't be read"):
        load(file=file)


@pytest.mark.parametrize("flags", [("--bacth-size", "2"), ("--batch", "2"), ("stray",)])
def test_an_unknown_flag_ends_with_its_name(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*flags)
    assert caught.value.code == 2
    assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("cls", [KilnSettings, DenoiserSettings, GatewaySettings])
def test_help_documents_every_setting(cls: type[ServerSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(cls, ["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert [field.name for field in setting_fields(cls) if f"--{field.name.replace('_', '-')} " not in text] == []
    assert [field.name for field in fields(cls) if not field.metadata["help"].endswith(".")] == []


def test_the_variable_of_a_field_names_the_service() -> None:
    class Stage(StageSettings):
        service: ClassVar[str] = "encoder"

    assert environment_name(Stage, "lease_seconds") == "SAFELIGHT_ENCODER_LEASE_SECONDS"
