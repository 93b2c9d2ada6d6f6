"""What every hub is: repositories at revisions, which hold files."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar, Protocol

from safelight.errors import DownloadError

_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class HubUnreachableError(DownloadError):
    """The hub does not answer, or only that it can't now; what is in the cache may do."""


@dataclass(frozen=True)
class Repository:
    """One model of a hub at one revision.

    Args:
        hub: "modelscope" or "huggingface".
        name: "owner/name".
        revision: branch, tag or commit; None: the hub's default branch.
    """

    hub: str
    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}{f' (revision {self.revision})' if self.revision else ''} at {self.hub}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        path: in the repository, with slashes.
        size: in bytes.
        digest: "sha256:" or "git:" (the SHA-1 of a git blob) and hex digits; empty: the hub does not tell.
    """

    path: str
    size: int
    digest: str = ""


class Hub(Protocol):
    """A hub, as seen with one access token."""

    offline_variable: ClassVar[str]
    """The environment variable that forbids this hub's network."""

    def files(self, repository: Repository) -> list[HubFile]:
        """What the repository holds.

        Raises:
            HubUnreachableError: the hub does not answer.
            DownloadError: there is no such repository, or the token may not read it.
        """
        ...

    def download(self, repository: Repository, file: HubFile, folder: Path) -> Path:
        """Transfer a file into a folder that nobody else uses now, going on from what an earlier call left there.

        Returns:
            where it is, whole and with the right digest.

        Raises:
            DownloadError: it did not arrive; what can be used of it is left for the next call.
        """
        ...


def answered(repository: Repository, status: int) -> DownloadError:
    """The error for a hub's answer that is none of success."""
    if status == HTTPStatus.NOT_FOUND:
        remedy = "check the name and the revision, or give the access token of a private one"
        return DownloadError(f"{repository}: not found (HTTP 404): {remedy}")
    if status in _REFUSED:
        remedy = "give an access token that may read it, check the name, and accept the model's terms if it has any"
        return DownloadError(f"{repository}: refused (HTTP {status}): {remedy}")
    return HubUnreachableError(f"{repository}: the hub answers HTTP {status}: try again later")


def unreachable(repository: Repository, endpoint_variable: str) -> HubUnreachableError:
    """The error for a hub that does not answer."""
    return HubUnreachableError(
        f"{repository}: the hub can't be reached: check the network, or name a mirror in {endpoint_variable}"
    )


def interrupted(repository: Repository, file: HubFile) -> DownloadError:
    """The error for a transfer that ended early."""
    return DownloadError(f"{repository}: {file.path} did not arrive whole: try again, it goes on from where it ended")


def damaged(repository: Repository, file: HubFile) -> DownloadError:
    """The error for a file that is not what the hub says it is."""
    return DownloadError(
        f"{repository}: {file.path} arrived damaged, its digest is not the hub's; nothing of it was kept: try again"
    )


def library_missing(hub: str, library: str) -> DownloadError:
    """The error for a hub whose library is not installed."""
    return DownloadError(f"source {hub!r} needs the package {library}: pip install 'safelight[hub]'")
