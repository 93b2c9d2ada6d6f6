"""Hugging Face, by its own client library.

Of that, the listing and the transfer of one file are used. Its downloads leave nothing that another process could go on
from, and check the size but no digest; both are added here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from safelight.errors import DownloadError
from safelight.hub.digests import has_digest
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
    from huggingface_hub.hf_api import RepoFile

_ENDPOINT_VARIABLE = "HF_ENDPOINT"


class HuggingFace:
    """Hugging Face, or the hub that HF_ENDPOINT names.

    Args:
        access_token: None: that of HF_TOKEN, or of an earlier login.
    """

    offline_variable: ClassVar[str] = "HF_HUB_OFFLINE"

    def __init__(self, access_token: str | None) -> None:
        self._token = access_token
        self._endpoint = os.environ.get(_ENDPOINT_VARIABLE)  # the library reads it once, when it is imported

    def files(self, repository: Repository) -> list[HubFile]:
        """What the repository holds."""
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.hf_api import RepoFile
        except ImportError as error:
            raise library_missing("huggingface", "huggingface-hub") from error
        api = HfApi(endpoint=self._endpoint, token=self._token)
        try:
            tree = list(api.list_repo_tree(repository.name, recursive=True, revision=repository.revision))
        except (_http_error(), OSError) as error:
            raise _answered(repository, error) or unreachable(repository, _ENDPOINT_VARIABLE) from error
        return [_hub_file(entry) for entry in tree if isinstance(entry, RepoFile)]

    def download(self, repository: Repository, file: HubFile, folder: Path) -> Path:
        """Transfer a file into the folder."""
        part = folder / f"{file.path}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        self._transfer(repository, file, part)
        if part.stat().st_size != file.size or not has_digest(part, file.digest):
            part.unlink()
            raise damaged(repository, file)
        return part

    def _transfer(self, repository: Repository, file: HubFile, part: Path) -> None:
        from huggingface_hub import get_token, hf_hub_url
        from huggingface_hub.file_download import http_get

        url = hf_hub_url(repository.name, file.path, revision=repository.revision, endpoint=self._endpoint)
        token = self._token or get_token()
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})}
        try:
            with part.open("ab") as out:
                http_get(
                    url,
                    out,
                    resume_size=out.tell(),
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
        except (_http_error(), OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of the hub
                raise
            raise _answered(repository, error) or interrupted(repository, file) from error


def _http_error() -> type[Exception]:
    """The base of the errors of the library that huggingface_hub speaks HTTP with, which differs by its version."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # not named in its __all__

    return HTTPError


def _answered(repository: Repository, error: Exception) -> DownloadError | None:
    """The error for what the hub said, if it said anything."""
    response = getattr(error, "response", None)
    return None if response is None else answered(repository, response.status_code)


def _hub_file(entry: RepoFile) -> HubFile:
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
    return HubFile(entry.path, entry.size, digest)
