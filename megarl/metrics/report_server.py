"""Serve the report of a run on loopback and keep it up to date while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megarl.errors import UserError
from megarl.metrics.report import render_runs


class ReportServer(ThreadingHTTPServer):
    """HTTP on 127.0.0.1: the page, made anew for each request, and ``version``, which changes with the run.

    Args:
        run_dirs: the run directory, and others whose curves are shown beside its own.
        port: of 127.0.0.1; 0: any free one.
    """

    daemon_threads = True

    def __init__(self, run_dirs: Sequence[Path], port: int = 0) -> None:
        self.run_dirs = run_dirs
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"--port: cannot listen on 127.0.0.1:{port} ({error.strerror})") from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def version(self) -> str:
        """Return a text that differs once a run has written more."""
        parts = []
        files = ("metrics.jsonl", "summary.json", "config.yaml")
        for path in (run_dir / name for run_dir in self.run_dirs for name in files):
            found = path.stat() if path.exists() else None
            parts.append("-" if found is None else f"{found.st_mtime_ns}.{found.st_size}")
        return "/".join(parts)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer with the page or the version; nothing else of the machine can be read."""
        # A page of another site could reach loopback by a name of its own (DNS rebinding).
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            self._answer("not here", HTTPStatus.FORBIDDEN, "text/plain")
        elif self.path == "/version":
            self._answer(self.server.version(), HTTPStatus.OK, "text/plain")
        elif self.path == "/":
            version = self.server.version()  # before reading: a line written meanwhile is news
            try:
                page = render_runs(self.server.run_dirs, version)
            except UserError as error:
                self._answer(str(error), HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain")
            else:
                self._answer(page, HTTPStatus.OK, "text/html")
        else:
            self._answer("not found", HTTPStatus.NOT_FOUND, "text/plain")

    def _answer(self, text: str, status: HTTPStatus, kind: str) -> None:
        body = text.encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print no line per request."""
