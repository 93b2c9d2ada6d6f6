"""Numbers that a request may set on a sampler or a schedule, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NONE_GIVEN: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Parameter:
    """A number with its default and the closed range that it must lie in."""

    default: float
    low: float
    high: float


def resolve_parameters(
    owner: str,
    declared: Mapping[str, Parameter],
    given: Mapping[str, float],
    of_model: Mapping[str, float] = NONE_GIVEN,
) -> dict[str, float]:
    """The given values over the model's own over the defaults.

    Raises ValueError, naming the owner, for an unknown name or a value out of range.
    """
    for name, value in given.items():
        if name not in declared:
            choices = ", ".join(declared) or "nothing"
            raise ValueError(f"{owner} has no parameter {name!r}; it takes {choices}")
        low, high = declared[name].low, declared[name].high
        if not low <= value <= high:
            raise ValueError(f"{owner}: {name} is {value}, must be in [{low:g}, {high:g}]")
    return {name: parameter.default for name, parameter in declared.items()} | {**of_model, **given}
