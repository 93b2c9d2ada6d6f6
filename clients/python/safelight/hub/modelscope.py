"""ModelScope, by its own client library.

It resumes, also in another process, checks the SHA-256 where the hub tells it, and renames last. What it lacks is in
snapshot.py: it hashes every file that is there on every call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from safelight.errors import DownloadError
from safelight.hub.repository import (
    HubFile,
    Repository,
    answered,
    damaged,
    interrupted,
    library_missing,
    unreachable,
)

if TYPE_CHECKING:
    from modelscope_hub import FileInfo, HubApi


class ModelScope:
    """ModelScope, or the hub that MODELSCOPE_ENDPOINT names.

    Args:
        access_token: None: that of MODELSCOPE_API_TOKEN, or of an earlier login.
    """

    offline_variable: ClassVar[str] = "MS_HUB_OFFLINE"

    def __init__(self, access_token: str | None) -> None:
        self._token = access_token

    def files(self, repository: Repository) -> list[HubFile]:
        """What the repository holds."""
        api = self._api()
        from modelscope_hub import HubError

        try:
            found = api.list_repo_files(repository.name, "model", revision=repository.revision)
        except (HubError, OSError) as error:
            raise _answered(repository, error) or unreachable(repository, "MODELSCOPE_ENDPOINT") from error
        return [_hub_file(entry) for entry in found if not entry.is_dir]

    def download(self, repository: Repository, file: HubFile, folder: Path) -> Path:
        """Transfer a file into the folder."""
        from modelscope_hub import FileIntegrityError, HubError

        try:
            return self._api().download_file(
                repository.name,
                "model",
                file.path,
                revision=repository.revision,
                local_dir=folder,
                cache_dir=folder,  # for its locks
                expected_sha256=file.digest.partition(":")[2] or None,
                file_size=file.size or None,  # an unknown size is listed as 0
            )
        except FileIntegrityError as error:
            raise damaged(repository, file) from error
        except HubError as error:
            raise _answered(repository, error) or interrupted(repository, file) from error

    def _api(self) -> HubApi:
        try:
            from modelscope_hub import HubApi, HubConfig
        except ImportError as error:
            raise library_missing("modelscope", "modelscope-hub") from error
        return HubApi(config=HubConfig(token=self._token))


def _answered(repository: Repository, error: Exception) -> DownloadError | None:
    """The error for what the hub said, if it said anything."""
    status = getattr(error, "status_code", None)
    return None if status is None else answered(repository, status)


def _hub_file(entry: FileInfo) -> HubFile:
    return HubFile(entry.path, entry.size, f"sha256:{entry.sha256}" if entry.sha256 else "")
