"""Which files of a repository a name, a wildcard or a folder stands for."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from safelight.errors import DownloadError
from safelight.hub.repository import HubFile, Repository

_NAMED_FILES = 12


def select(repository: Repository, files: Sequence[HubFile], pattern: str) -> list[HubFile]:
    """The files of that name or wildcard, or else those in the folder of that name, sorted.

    In a wildcard `*` and `?` stand for characters of one name, `**` for any folders, as in a shell.

    Raises:
        DownloadError: there are none; it names what the repository holds.
    """
    parts = pattern.strip("/").split("/")
    chosen = [file for file in files if _matches(file.path.split("/"), parts)]
    chosen = chosen or [file for file in files if _matches(file.path.split("/"), [*parts, "**", "*"])]
    if not chosen:
        raise DownloadError(f"{repository}: path {pattern!r} matches nothing there; it holds {_named(files)}")
    return sorted(chosen, key=lambda file: file.path)


def is_folder(files: Sequence[HubFile], path: str) -> bool:
    """Whether that name is a folder's."""
    return any(file.path.startswith(f"{path.strip('/')}/") for file in files)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _named(files: Sequence[HubFile]) -> str:
    names = sorted(file.path for file in files)
    rest = len(names) - _NAMED_FILES
    return (", ".join(names[:_NAMED_FILES]) or "no files") + (f" and {rest} more" if rest > 0 else "")
