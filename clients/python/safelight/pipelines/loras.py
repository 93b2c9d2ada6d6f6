"""The LoRAs of a pipeline: loaded into its stack or gateway, and named in every request of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.connection import Connection
from safelight.errors import InvalidRequestError, UnknownAdapterError
from safelight.pipelines.lora_schedules import LoraSchedule, schedule_of


@dataclass
class LoraConfig:
    """How a LoRA is applied.

    Args:
        scale: multiplier of its change; 1 is as trained.
        scheduler_config: the shift of a flow's schedule that the LoRA was distilled with, e.g.
            {"exponential_shift_mu": 1.1}; of several LoRAs the last one's counts. None: the model's.
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
        schedules: of those that want one, by the same names.
    """

    connection: Connection
    model: str
    scales: dict[str, float] = field(default_factory=dict)
    schedules: dict[str, LoraSchedule] = field(default_factory=dict)

    @property
    def schedule(self) -> LoraSchedule:
        """Of what is drawn with them: the last one's."""
        return next(reversed(self.schedules.values()), LoraSchedule())

    def load(self, loras: Iterable[tuple[str | Path, float | LoraConfig]]) -> None:
        """Load all of them, or none; one that is loaded already gets the new scale.

        Raises:
            SafelightError: as Client.load_adapter.
        """
        wanted = {str(path): _config_of(scale) for path, scale in loras}
        schedules = {
            _name_of(path): schedule_of(config.scheduler_config)
            for path, config in wanted.items()
            if config.scheduler_config is not None
        }
        new: dict[str, float] = {}
        try:
            for path, config in wanted.items():
                self.connection.load_adapter(path, name=_name_of(path), model=self.model)
                new[_name_of(path)] = float(config.scale)
        except BaseException:
            self._unload(new.keys() - self.scales.keys())
            raise
        self.scales |= new
        self.schedules = {name: each for name, each in self.schedules.items() if name not in new} | schedules

    def unload(self) -> None:
        """Forget all of them.

        Raises:
            SafelightError: the gateway can't be reached.
        """
        names, self.scales, self.schedules = list(self.scales), {}, {}
        self._unload(names)

    def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self.connection.unload_adapter(name, model=self.model)
            except UnknownAdapterError:
                continue  # somebody else has


def _config_of(given: float | LoraConfig) -> LoraConfig:
    config = given if isinstance(given, LoraConfig) else LoraConfig(given)
    if isinstance(config.scale, bool) or not isinstance(config.scale, int | float):
        raise InvalidRequestError.of("scale", f"is {config.scale!r}; must be a number or a LoraConfig")
    return config


def _name_of(path: str) -> str:
    """The file's name with a mark of its path, so that files of one name are told apart."""
    mark = hashlib.blake2s(str(Path(path).absolute()).encode(), digest_size=4).hexdigest()
    return f"{Path(path).stem}-{mark}"
