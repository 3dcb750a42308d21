"""A hub of one's own: as much of its HTTP interface as the datasets library asks for, with every byte counted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_API = re.compile(
    r"/api/datasets/(?P<name>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|paths-info)/(?P<commit>[^/]+)(/(?P<path>.*))?)?"
)
_RESOLVE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<path>.*)")


class Hub:
    """Datasets by name, each a mapping of paths to bytes. `served` counts the bytes of each file that went out.

    `asked` are the requests in order. A file in `broken` ends so many of its answers in the middle. A hub that is
    `silent` answers nothing at all.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.served: Counter[str] = Counter()
        self.asked: list[str] = []
        self.broken: dict[str, int] = {}
        self.silent = False

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Commit a dataset's files; gives the commit's hash."""
        self.datasets[name] = dict(files)
        return self.commit(name)

    def commit(self, name: str) -> str:
        """The hash of what a dataset holds now."""
        digest = hashlib.sha1(name.encode())
        for path, data in sorted(self.datasets[name].items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()

    def forget(self) -> None:
        """Count from nothing again."""
        self.served.clear()
        self.asked.clear()

    @property
    def opened(self) -> set[str]:
        """The files of which bytes went out."""
        return {path for path, count in self.served.items() if count}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the libraries of this process ask that hub, and keep what they and we cache below the folder."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """The same for a process that is started: its environment."""
    told = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hub"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return {**os.environ, **told, "XDG_CACHE_HOME": str(folder / "cache")}


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a file with a row a line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.silent:
            self.close_connection = True
            return
        file, question = _RESOLVE.fullmatch(path), _API.fullmatch(path)
        found = file or question
        files = self.hub.datasets.get(found["name"]) if found else None
        if found is None or files is None:
            self._error(404, "RepoNotFound")
        elif file is not None:
            self._file(files, file["path"], file["commit"])
        else:
            assert question is not None
            self._api(question, files, parse_qs(body.decode()) | parse_qs(parts.query))

    def _api(self, question: re.Match[str], files: dict[str, bytes], form: dict[str, list[str]]) -> None:
        name, what, below = question["name"], question["what"], question["path"] or ""
        if what == "tree":
            self._json(_tree(files, below, form.get("recursive", [""])[0].lower() == "true"))
        elif what == "paths-info":
            known = {entry["path"]: entry for entry in _tree(files, "", True)}
            self._json([known[path] for path in form.get("paths", []) if path in known])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": self.hub.commit(name), "siblings": siblings, "tags": []})

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        data = files.get(path)
        if data is None:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if wanted:
            status, first = 206, int(wanted[1])
            last = min(int(wanted[2]) if wanted[2] else len(data) - 1, len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.broken.get(path, 0) > 0:
            self.hub.broken[path] -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.hub.served[path] += len(data)
        self.wfile.write(data)

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries as the hub lists them, folders too."""
    prefix = f"{below.strip('/')}/" if below.strip("/") else ""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if not path.startswith(prefix):
            continue
        steps = path[len(prefix) :].split("/")
        for count in range(1, len(steps)):
            folder = prefix + "/".join(steps[:count])
            if recursive or count == 1:
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if recursive or len(steps) == 1:
            oid = hashlib.sha1(data).hexdigest()
            found[path] = {"type": "file", "path": path, "oid": oid, "size": len(data)}
    return list(found.values())
