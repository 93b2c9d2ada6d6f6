"""The embedded stack says why it does not start, and never outlives who started it."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safelight import (
    CheckpointError,
    Client,
    EmbeddedStack,
    InvalidRequestError,
    SafelightError,
    SDImagePipeline,
    StageUnavailableError,
)
from tests.clients.processes import nothing_left, servers_of, start, wait_for

STARTS = """
import sys
from safelight import EmbeddedStack
stack = EmbeddedStack([{"name": "tiny", "path": sys.argv[1]}])
print("started", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_temporary_folder(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))


def _error_of(arguments: dict[str, Any]) -> SafelightError:
    with pytest.raises(SafelightError) as caught:
        EmbeddedStack(**arguments)
    return caught.value


def test_a_start_that_fails_is_an_error_of_its_kind_with_the_reason(scratch: Path) -> None:
    starts: dict[type[SafelightError], dict[str, Any]] = {
        CheckpointError: {"models": [{"name": "tiny", "path": "nowhere"}]},
        InvalidRequestError: {"models": [{"nam": "tiny"}], "threads": 1},
    }
    with ThreadPoolExecutor(2) as threads:
        errors = list(threads.map(_error_of, starts.values()))
    assert [type(error) for error in errors] == list(starts)
    assert errors[0].message == (
        "the embedded stack did not start: model 'tiny': nowhere does not exist: correct the path in the manifest"
    )
    assert "models[0]: 'nam' is not a field; there are name, path" in errors[1].message
    assert nothing_left(scratch)


def test_a_stack_that_dies_is_told_with_a_remedy_and_leaves_nothing(tiny_sd15: Path, scratch: Path) -> None:
    with SDImagePipeline.from_pretrained(tiny_sd15) as pipeline:
        endpoint = pipeline._connection.endpoint
        os.kill(servers_of(scratch)[0], signal.SIGKILL)
        with pytest.raises(StageUnavailableError, match=r"the embedded stack has ended \(signal 9\); .* start another"):
            pipeline(prompt="a cat")
        with Client(endpoint) as client, pytest.raises(StageUnavailableError, match="no gateway answers at unix:"):
            client.models()
    assert nothing_left(scratch)


def test_a_pipeline_that_is_dropped_takes_its_stack_along(tiny_sd15: Path, scratch: Path) -> None:
    pipeline = SDImagePipeline.from_pretrained(tiny_sd15)
    assert len(servers_of(scratch)) == 1
    del pipeline
    gc.collect()
    assert nothing_left(scratch)


def test_a_parent_that_is_killed_takes_its_stack_along(tiny_sd15: Path, scratch: Path) -> None:
    with start(["-c", STARTS, str(tiny_sd15)], scratch) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        assert len(servers_of(scratch)) == 1
        script.kill()
    assert nothing_left(scratch)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_parent_that_ends_during_the_start_takes_its_stack_along(
    tiny_sd15: Path, scratch: Path, number: signal.Signals
) -> None:
    with start(["-c", STARTS, str(tiny_sd15)], scratch) as script:
        assert wait_for(lambda: bool(servers_of(scratch)))
        script.send_signal(number)
    assert script.returncode == -number
    assert nothing_left(scratch)
