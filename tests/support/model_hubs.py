"""ModelScope and Hugging Face on the loopback: what their client libraries ask of them, and the faults of real ones."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


class Asked(NamedTuple):
    """One request for a file: its path and the first byte asked for."""

    path: str
    start: int


@dataclass
class Faults:
    """What goes wrong.

    Args:
        token: without it, everything is refused with HTTP 403.
        status: the answer to everything, if not 0.
        cut_at: byte of a file before which the connection breaks.
        cuts: how many transfers break so.
        corrupt: files whose bytes are not those of their digest.
        hold_at: byte of a file before which the transfer stands still until `go_on` is set.
    """

    token: str = ""
    status: int = 0
    cut_at: int = 0
    cuts: int = 0
    corrupt: set[str] = field(default_factory=set)
    hold_at: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)


class ModelHub(ThreadingHTTPServer):
    """A hub with repositories: files by revision by name.

    >>> hub = ModelScopeHub({"acme/tiny": {"master": {"config.json": b"{}"}}})
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], repositories: Mapping[str, Mapping[str, Files]]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.repositories = {name: dict(revisions) for name, revisions in repositories.items()}
        self.faults = Faults()
        self.asked: list[Asked] = []
        self.tokens: set[str] = set()
        self.holding = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.faults.go_on.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of ours."""


class ModelScopeHub(ModelHub):
    """Serves what `modelscope_hub` asks for; its address goes into MODELSCOPE_ENDPOINT."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Files]]) -> None:
        super().__init__(_ModelScopeHandler, repositories)


class HuggingFaceHub(ModelHub):
    """Serves what `huggingface_hub` asks for; its address goes into HF_ENDPOINT."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Files]]) -> None:
        super().__init__(_HuggingFaceHandler, repositories)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelHub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests read `asked` instead."""

    def refuse_or(self) -> bool:
        """Whether the request has been answered with a fault."""
        faults, token = self.server.faults, (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.tokens.add(token)
        status = faults.status or (403 if faults.token and token != faults.token else 0)
        if status:
            self.answer_json(status, {"Code": status, "Message": "no", "error": "no"})
        return bool(status)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_json(self, status: int, content: Any, **headers: str) -> None:
        """An answer of a program's kind."""
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def answer_file(self, path: str, body: bytes, **headers: str) -> None:
        """The file from the byte asked for, with the faults that are on."""
        faults = self.server.faults
        ranged_from = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(ranged_from[1]) if ranged_from else 0
        self.server.asked.append(Asked(path, start))
        sent = bytes(len(body)) if path in faults.corrupt else body
        self.send_response(206 if start else 200)
        ranged = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        for name, value in {"Content-Length": str(len(body) - start), **ranged, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self._send_body(sent, start)

    def _send_body(self, body: bytes, start: int) -> None:
        faults = self.server.faults
        if faults.cuts:
            faults.cuts -= 1
            self.wfile.write(body[start : faults.cut_at])
            self.close_connection = True
            return
        if faults.hold_at:
            self.wfile.write(body[start : faults.hold_at])
            self.server.holding.set()
            faults.go_on.wait(60)
            start = max(start, faults.hold_at)
        self.wfile.write(body[start:])


class _ModelScopeHandler(_Handler):
    def do_GET(self) -> None:
        """The listing of a repository, or one of its files."""
        if self.refuse_or():
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = re.match(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?$", url.path)
        files = self.server.repositories.get(found[1], {}).get(query.get("Revision", "master")) if found else None
        if found is None or files is None:
            self.answer_json(404, {"Code": 404, "Success": False, "Message": "Record not found"})
        elif found[2]:
            entries = [_modelscope_entry(path, body) for path, body in files.items()]
            self.answer_json(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif query["FilePath"] in files:
            self.answer_file(query["FilePath"], files[query["FilePath"]])
        else:
            self.answer_json(404, {"Code": 404, "Success": False, "Message": "file not found"})


def _modelscope_entry(path: str, body: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(body).hexdigest()
    return {"Name": path.split("/")[-1], "Path": path, "Type": "blob", "Size": len(body), "Sha256": digest}


class _HuggingFaceHandler(_Handler):
    def do_GET(self) -> None:
        """The tree of a repository, or one of its files."""
        if self.refuse_or():
            return
        path = unquote(urlsplit(self.path).path)
        if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)$", path):
            files = self._files(found[1], found[2])
            if files is not None:
                self.answer_json(200, [_huggingface_entry(name, body) for name, body in files.items()])
        elif found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
            files = self._files(found[1], found[2])
            if files is not None:
                self.answer_file(found[3], files[found[3]])

    def _files(self, repository: str, revision: str) -> Files | None:
        """The files; None: answered already that there are none."""
        revisions = self.server.repositories.get(repository)
        files = (revisions or {}).get(revision)
        if files is None:
            code = "RepoNotFound" if revisions is None else "RevisionNotFound"
            self.answer_json(404, {"error": code}, X_Error_Code=code)
        return files


def _huggingface_entry(path: str, body: bytes) -> dict[str, Any]:
    """Large files lie beside git, under their SHA-256; small ones are git's blobs."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry
