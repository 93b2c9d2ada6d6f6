"""Laws of logs: one JSON object a line, with what the program and the request added."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from services.common.logs import JsonFormatter, configure_logs
from services.common.request_context import request_id
from services.common.settings import SettingsError


@pytest.fixture
def _as_request() -> Iterator[None]:
    token = request_id.set("6f1c")
    yield
    request_id.reset(token)


def formatted(message: str, *arguments: object, exc_info: Any = None, **extra: object) -> dict[str, Any]:
    record = logging.getLogger("safelight.calls").makeRecord(
        "safelight.calls", logging.WARNING, __file__, 1, message, arguments, exc_info, extra=extra
    )
    line = JsonFormatter("encoder").format(record)
    assert "\n" not in line
    entry: dict[str, Any] = json.loads(line)
    return entry


def test_a_line_says_when_who_and_what() -> None:
    entry = formatted("call %s ended", "Encode")
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning",
        "service": "encoder",
        "logger": "safelight.calls",
        "message": "call Encode ended",
    }


@pytest.mark.usefixtures("_as_request")
def test_a_line_has_the_request_id() -> None:
    assert formatted("call ended")["request_id"] == "6f1c"


def test_extra_fields_are_members() -> None:
    entry = formatted("call ended", seconds=0.25, path=JsonFormatter)
    assert (entry["seconds"], entry["path"]) == (0.25, str(JsonFormatter))


def test_a_message_of_several_lines_stays_one_line() -> None:
    assert formatted("two\nlines «und» 猫")["message"] == "two\nlines «und» 猫"


def test_an_exception_is_there_with_its_traceback() -> None:
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        entry = formatted("call failed", exc_info=sys.exc_info())
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ZeroDivisionError: integer division or modulo by zero")


def test_an_unknown_level_is_an_error_that_names_it() -> None:
    with pytest.raises(SettingsError, match="log_level: 'loud' is not one of debug, info, warning, error"):
        configure_logs("encoder", "loud")
