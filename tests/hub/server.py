"""A hub of one process: the requests of huggingface_hub for models and data sets, over HTTP on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class FakeHub:
    """Repositories in memory.

    ``files`` is repository ("org/name", "datasets/org/name") -> branch -> file name -> content. ``gets``
    counts the downloads of each file.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, str] = {}  # repository -> the token that reads it
        self.gets: Counter[str] = Counter()
        self.writers: set[str] = set()  # tokens that may write
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repository: str, branch: str = "main") -> str:
        """A name of the branch's content."""
        content = sorted((name, data.hex()) for name, data in self.files[repository][branch].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def branch(self, repository: str, revision: str) -> str | None:
        """The branch that a revision, its name or commit, is."""
        branches = self.files[repository]
        return next((b for b in branches if revision in (b, self.commit(repository, b))), None)


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _entries(files: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, object]]:
    """What lies in a folder, with its folders alone unless ``deep``."""
    inside = {path: data for path, data in files.items() if path.startswith(folder)}
    here = [path for path in inside if deep or "/" not in path[len(folder) :]]
    folders = {folder + path[len(folder) :].split("/")[0] for path in inside if path not in here}
    return [
        *(_entry(path, files[path]) for path in here),
        *({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)),
    ]


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a hub until the end of the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            parts = path.split("/")
            api = parts[0] == "api"
            if self.command == "POST" and parts[1] != "datasets":
                return self._write(parts[1:])
            if api:
                parts = parts[1:]
            kind = "datasets/" if parts[0] == "datasets" else ""
            if parts[0] in ("models", "datasets"):
                parts = parts[1:]
            repository = kind + "/".join(parts[:2])
            token = hub.private.get(repository)
            if repository not in hub.files or (token and self.headers["Authorization"] != f"Bearer {token}"):
                return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            action, *rest = [*parts[2:], "revision", "main"] if len(parts) == 2 else parts[2:]
            found = self._branch(repository, rest)
            if found is None:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            branch, name = found
            commit, files = hub.commit(repository, branch), hub.files[repository][branch]
            if api and action == "revision":
                siblings = [{"rfilename": each} for each in files]
                body = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "private": False}
                return self._json(body | {"gated": False, "tags": [], "downloads": 0, "likes": 0})
            if api and action == "tree":
                deep = "recursive=true" in self.path.lower()
                return self._json(_entries(files, f"{name}/" if name else "", deep))
            if api and action == "paths-info":
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
                return self._json([_entry(each, files[each]) for each in asked if each in files])
            if api or action != "resolve" or name not in files:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                hub.gets[name] += 1
            etag = hashlib.sha1(files[name]).hexdigest()
            return self._send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        def _body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _write(self, parts: list[str]) -> None:
            """Make a repository or a branch, say how to upload, or take a commit."""
            body = self._body()
            if parts[0] == "validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if self.headers["Authorization"].removeprefix("Bearer ") not in hub.writers:
                return self._send(403, b"{}", {})
            if parts[:2] == ["repos", "create"]:
                asked = json.loads(body)
                name = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                )
                hub.files.setdefault(name, {"main": {}})
                return self._json({"url": f"{hub.url}/{name}"})
            repository, action, *revision = "/".join(parts[1:3]), parts[3], *parts[4:]
            branches, branch = hub.files[repository], "/".join(revision)
            if action == "branch":
                branches.setdefault(branch, dict(branches["main"]))
                return self._json({})
            if action == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return self._json({"files": modes})
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    file = operation["value"]
                    branches[branch][file["path"]] = base64.b64decode(file["content"])
            commit = hub.commit(repository, branch)
            address = f"{hub.url}/{repository}/commit/{commit}"
            return self._json({"success": True, "commitUrl": address, "commitOid": commit})

        def _branch(self, repository: str, rest: list[str]) -> tuple[str, str] | None:
            """(branch, remaining path); a branch's name may have slashes."""
            for end in range(len(rest), 0, -1):
                if branch := hub.branch(repository, "/".join(rest[:end])):
                    return branch, "/".join(rest[end:])
            return None

        def _json(self, body: object) -> None:
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have huggingface_hub ask the hub at ``url`` and keep its files in ``cache``."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
