"""The LoRAs of a pipeline: loaded into its stack or gateway, and named in every request of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.connection import Connection
from safelight.errors import InvalidRequestError, UnknownAdapterError, UnsupportedError


@dataclass
class LoraConfig:
    """How a LoRA is applied.

    Args:
        scale: multiplier of its change; 1 is as trained.
        scheduler_config: only None is served; give the call a schedule in its place.
    """

    scale: float
    scheduler_config: Mapping[str, Any] | None = None


@dataclass
class Loras:
    """What a pipeline has loaded.

    Args:
        connection: to the gateway that is told.
        model: whose they are.
        scales: of each, by its name at the gateway.
    """

    connection: Connection
    model: str
    scales: dict[str, float] = field(default_factory=dict)

    def load(self, loras: Iterable[tuple[str | Path, float | LoraConfig]]) -> None:
        """Load all of them, or none; one that is loaded already gets the new scale.

        Raises:
            SafelightError: as Client.load_adapter.
        """
        wanted = {str(path): _scale_of(scale) for path, scale in loras}
        new: dict[str, float] = {}
        try:
            for path, scale in wanted.items():
                self.connection.load_adapter(path, name=_name_of(path), model=self.model)
                new[_name_of(path)] = scale
        except BaseException:
            self._unload(new.keys() - self.scales.keys())
            raise
        self.scales |= new

    def unload(self) -> None:
        """Forget all of them.

        Raises:
            SafelightError: the gateway can't be reached.
        """
        names, self.scales = list(self.scales), {}
        self._unload(names)

    def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self.connection.unload_adapter(name, model=self.model)
            except UnknownAdapterError:
                continue  # somebody else has


def _scale_of(given: float | LoraConfig) -> float:
    config = given if isinstance(given, LoraConfig) else LoraConfig(given)
    if config.scheduler_config is not None:
        raise UnsupportedError("scheduler_config: not served by this release; leave it out")
    if isinstance(config.scale, bool) or not isinstance(config.scale, int | float):
        raise InvalidRequestError.of("scale", f"is {config.scale!r}; must be a number or a LoraConfig")
    return float(config.scale)


def _name_of(path: str) -> str:
    """The file's name with a mark of its path, so that files of one name are told apart."""
    mark = hashlib.blake2s(str(Path(path).absolute()).encode(), digest_size=4).hexdigest()
    return f"{Path(path).stem}-{mark}"
