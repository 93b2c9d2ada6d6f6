"""Checks that more than one service makes: what is wrong with a field, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.message import Message

from safelight.errors import FieldViolation, UnsupportedError
from safelight.v1.work_pb2 import Adapter, DeterminismClass, SizeConditioning, WorkContext

MAX_SEED = 2**63 - 1
MAX_ADAPTERS = 64
MAX_ADAPTER_SCALE = 100
_MAX_TOLD_PIXELS = 65_536


def refuse_unserved(request: Message, fields: Iterable[str], model: str) -> None:
    """Raises UnsupportedError if one of the fields, which the contract has and this release does not serve, is set."""
    present = {descriptor.name for descriptor, _ in request.ListFields()}
    for field in fields:
        if field in present:
            raise UnsupportedError(f"{field}: not served by model {model!r}; leave it out", field=field)


def check_range(field: str, value: float, low: float, high: float) -> Iterator[FieldViolation]:
    """A finite number in [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        yield FieldViolation(field, f"is {value:g}; must be from {low:g} to {high:g}")


def check_seed(field: str, seed: int) -> Iterator[FieldViolation]:
    """A seed that every random generator takes."""
    if seed < 0:
        yield FieldViolation(field, f"is {seed}; must be from 0 to {MAX_SEED}, or left out to have one drawn")


def check_adapters(adapters: Sequence[Adapter]) -> Iterator[FieldViolation]:
    """Adapters with a name each, no two alike, and a scale that makes sense."""
    yield from check_range("adapters", len(adapters), 0, MAX_ADAPTERS)
    names = set()
    for index, adapter in enumerate(adapters):
        field = f"adapters[{index}]"
        yield from check_range(f"{field}.scale", adapter.scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
        if not adapter.name:
            yield FieldViolation(f"{field}.name", "is empty; give the name of a loaded adapter")
        elif adapter.name in names:
            yield FieldViolation(
                f"{field}.name", f"{adapter.name!r} is given twice; give one, with the sum of the scales"
            )
        names.add(adapter.name)


def check_deadline(context: WorkContext) -> Iterator[FieldViolation]:
    """A moment that a Timestamp can hold: from the year 1 to 9999."""
    try:
        context.deadline.ToNanoseconds()
    except ValueError:
        yield FieldViolation(
            "context.deadline",
            f"is {context.deadline.seconds} s and {context.deadline.nanos} ns after 1970; must be a valid Timestamp",
        )


def check_determinism(value: DeterminismClass.ValueType) -> Iterator[FieldViolation]:
    """One of the classes that the contract has."""
    if value not in DeterminismClass.values():
        yield FieldViolation("determinism", f"is {value}; choose from {', '.join(DeterminismClass.keys())}")


def check_size_conditioning(sizes: SizeConditioning) -> Iterator[FieldViolation]:
    """Sizes in pixels that a picture can have."""
    for descriptor, pixels in sizes.ListFields():
        yield from check_range(f"size_conditioning.{descriptor.name}", pixels, 0, _MAX_TOLD_PIXELS)
