"""Messages that no honest client sends: valid ones with a few fields spoiled, and valid bytes mutilated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_DEPTH = 4
_YEAR_9999 = 253_402_300_799
_INTEGERS = (
    0,
    1,
    2,
    7,
    1000,
    2**31 - 1,
    2**32 - 1,
    _YEAR_9999,
    2**62,
    2**63 - 1,
    2**64 - 1,
    -1,
    -7,
    -(2**31),
    -(2**63),
)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 0.5, 1e308, 5e-324)
_TEXTS = ("", "tiny", "\0", "..", "é" * 50, "a" * 70_000, "euler", "127.0.0.1:1", "unix:/nowhere", "x:y:z", "alice")
_BYTES = (b"", b"\0", b"\0" * 8, b"x" * 256, b"x" * 70_000, b"\x89PNG\r\n\x1a\n" + bytes(64), b"\xff\xd8\xff\xe0")
_COUNTS = (0, 1, 2, 9, 500)
_BITS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
}


@dataclass(frozen=True)
class Nonsense:
    """A request's bytes; shown as what is wrong with them."""

    data: bytes = field(repr=False)
    changes: tuple[str, ...]


@st.composite
def spoiled(draw: st.DrawFn, valid: Callable[[], Message]) -> Nonsense:
    """The message with one to three fields, at any depth, that lie, overflow, repeat or are missing."""
    message = type(valid()).FromString(valid().SerializeToString())
    changes = tuple(_spoil(draw, message, _DEPTH) for _ in range(draw(st.integers(1, 3))))
    return Nonsense(message.SerializeToString(), changes)


@st.composite
def mutilated(draw: st.DrawFn, valid: Callable[[], bytes]) -> Nonsense:
    """The bytes, cut off, changed, or with others put in."""
    data = bytearray(valid())
    start = draw(st.integers(0, len(data)))
    damage = draw(st.sampled_from(("cut", "flip", "insert", "repeat", "replace")))
    other = draw(st.binary(min_size=1, max_size=16))
    if damage == "cut":
        del data[start:]
    elif damage == "flip":
        data[start : start + 1] = other[:1]
    elif damage == "insert":
        data[start:start] = other
    elif damage == "repeat":
        data += data[start:] * 3
    else:
        data = bytearray(other)
    return Nonsense(bytes(data), (f"{damage} at {start} with {other!r}",))


def _spoil(draw: st.DrawFn, message: Message, depth: int) -> str:
    """Change one field of the message, or of one inside it; returns what was done."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return "nothing"
    field = draw(st.sampled_from(fields))
    if _is_map(field):
        return _spoil_map(draw, message, field)
    if field.is_repeated:
        return _spoil_list(draw, message, field, depth)
    if field.message_type is None:
        value = _scalar(draw, field)
        setattr(message, field.name, value)
        return f"{field.name} = {value!r:.40}"
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        message.ClearField(field.name)
        return f"no {field.name}"
    inner = getattr(message, field.name)
    inner.SetInParent()
    return f"{field.name}.{_spoil(draw, inner, depth - 1)}"


def _spoil_map(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> str:
    """Give a map of scalars an entry."""
    entry: Any = field.message_type
    key, value = (_scalar(draw, part) for part in entry.fields)
    getattr(message, field.name)[key] = value
    return f"{field.name}[{key!r:.40}] = {value!r:.40}"


def _spoil_list(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> str:
    values: Any = getattr(message, field.name)
    if field.message_type is not None and len(values) and depth and draw(st.booleans()):
        return f"{field.name}[0].{_spoil(draw, values[0], depth - 1)}"
    count = draw(st.sampled_from(_COUNTS))
    if field.message_type is None:
        value = _scalar(draw, field)
        values[:] = [value] * count
        return f"{field.name} = [{value!r:.40}] * {count}"
    first = values[0] if len(values) else values.add()
    copies = [type(first).FromString(first.SerializeToString())] * count
    message.ClearField(field.name)
    getattr(message, field.name).extend(copies)
    return f"{count} {field.name}"


def _scalar(draw: st.DrawFn, field: FieldDescriptor) -> Any:
    if field.type in _BITS:
        low, high = _BITS[field.type]
        return draw(st.sampled_from([number for number in _INTEGERS if low <= number <= high]))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return draw(st.sampled_from(_FLOATS))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw(st.booleans())
    return draw(st.sampled_from(_BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
