"""Settings: one frozen dataclass a service, filled from a YAML file, the environment and flags, in that order of rank.

A field `lease_seconds` of the encoder is `lease_seconds:` in the file, `SAFELIGHT_ENCODER_LEASE_SECONDS` in the
environment and `--lease-seconds` as a flag. A name that no field has, or a value that does not parse, ends the start
with its name: a typo never becomes a silent default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import yaml

from safelight.byte_sizes import parse_byte_size
from services.common.channels import MAX_MESSAGE_BYTES


class SettingsError(Exception):
    """A setting is unknown or can't be read; the message names it."""


def setting(default: Any, help_text: str) -> Any:
    """A settings field: its default, and the sentence that documents it."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What every server takes."""

    service: ClassVar[str]
    command: ClassVar[str] = "safelight {service} serve"

    listen: str = setting("127.0.0.1:0", "Address of the gRPC server: host:port, or unix:/path.")
    advertise: str = setting("", "Address that other services reach this one at; empty: the listen address.")
    metrics_host: str = setting("127.0.0.1", "Address of the /metrics endpoint.")
    metrics_port: int = setting(-1, "Port of the /metrics endpoint; 0 takes a free one, -1 turns it off.")
    log_level: str = setting("info", "Least severe log lines written: debug, info, warning or error.")
    drain_seconds: float = setting(30.0, "Time after SIGTERM for calls to end and for leased tensors to be fetched.")
    reflection: bool = setting(True, "Serve gRPC reflection, for grpcurl and the like.")

    @property
    def max_message_bytes(self) -> int:
        """Largest message that the server takes."""
        return MAX_MESSAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class StageSettings(ServerSettings):
    """What every stage takes."""

    manifest: str = setting("", "YAML file that lists the models (docs/models.md); empty: the demo model.")
    fetch: bool = setting(True, "Fetch weights from hubs (docs/models.md); if not, they must be on this machine.")
    device: str = setting("auto", "torch device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.")
    threads: int = setting(0, "Threads of a CPU computation; 0: torch's choice.")
    offload: str = setting(
        "none", "When weights leave the GPU: none, cpu_offload or sequential_cpu_offload (docs/models.md)."
    )
    memory_budget: int | None = setting(
        None, "Most GPU memory for each network's weights, e.g. 12GiB; the rest streams. None: no bound."
    )
    lease_seconds: float = setting(120.0, "How long a tensor is kept for its consumer.")
    max_tensor_bytes: int = setting(2 * 1024**3, "Largest tensor accepted from another stage.")
    shared_memory_bytes: int = setting(
        64 * 1024**2, "Most memory for handing tensors to other processes of this host; 0 turns that off."
    )
    queue_capacity: int = setting(64, "Requests that may wait; one more gets RESOURCE_EXHAUSTED.")


Settings = TypeVar("Settings", bound=ServerSettings)


def load_settings(cls: type[Settings], argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings of a service from its flags, its environment and the file that `--config` names.

    Raises:
        SettingsError: an unknown name, or a value of the wrong type.
    """
    parsed = vars(_parser(cls).parse_args(argv))
    values = _from_file(cls, parsed.pop("config"))
    values |= _from_environment(cls, environ)
    values |= {name: _parse(cls, name, text, _flag(name)) for name, text in parsed.items() if text is not None}
    return cls(**values)


def environment_name(cls: type[ServerSettings], name: str) -> str:
    """The environment variable of a field."""
    return f"SAFELIGHT_{cls.service}_{name}".upper()


def setting_fields(cls: type[ServerSettings]) -> tuple[Field[Any], ...]:
    """The fields of a settings class, in order of definition."""
    return fields(cls)


def _parser(cls: type[ServerSettings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=cls.command.format(service=cls.service), allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with settings")
    for each in setting_fields(cls):
        text = f"{each.metadata['help']} (default: {each.default})".replace("%", "%%")  # argparse formats it
        parser.add_argument(_flag(each.name), dest=each.name, help=text)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_file(cls: type[ServerSettings], path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: can't be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must be a mapping of settings to values")
    _refuse_unknown(content, {each.name for each in setting_fields(cls)}, f"{path}: ")
    return {name: _parse(cls, name, _text(value, name, path), f"{path}: {name}") for name, value in content.items()}


def _text(value: Any, name: str, path: str) -> str:
    """A YAML value as the environment would have it."""
    if value is None or isinstance(value, Mapping):
        raise SettingsError(f"{path}: {name}: must have a value, or a list of values")
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_environment(cls: type[ServerSettings], environ: Mapping[str, str]) -> dict[str, Any]:
    names = {environment_name(cls, each.name): each.name for each in setting_fields(cls)}
    prefix = environment_name(cls, "")
    given = {name: text for name, text in environ.items() if name.startswith(prefix)}
    _refuse_unknown(given, names, "")
    return {names[name]: _parse(cls, names[name], text, name) for name, text in given.items()}


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any] | set[str], where: str) -> None:
    if unknown := sorted(map(str, set(given) - set(known))):
        raise SettingsError(f"{where}{unknown[0]} is not a setting; there are {', '.join(sorted(known))}")


def _parse(cls: type[ServerSettings], name: str, text: str, source: str) -> Any:
    parse = _PARSERS[get_type_hints(cls)[name]]
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"{source}: {text!r} is not {_NOUNS[parse]}") from error


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _parse_bool(text: str) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_bound(text: str) -> int | None:
    """Bytes, or no bound."""
    return None if text.lower() in ("", "none") else parse_byte_size(text)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: _parse_float,
    bool: _parse_bool,
    tuple[str, ...]: _parse_list,
    int | None: _parse_bound,
}
_NOUNS: dict[Callable[[str], Any], str] = {
    int: "a whole number",
    _parse_float: "a finite number",
    _parse_bool: "true or false",
    _parse_bound: "a size such as 12GiB or 500MB, or a number of bytes",
}
