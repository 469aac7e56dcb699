"""A sandboxed process seen from outside: what goes in, what comes out, and when it is enough."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Literal, cast

Outcome = Literal["exited", "timeout", "memory", "disk", "processes", "output", "stopped"]

_ISOLATION_SECONDS = 60.0  # to make the isolation, on a busy machine; the program's own time begins after it
_DRAIN_SECONDS = 1.0  # for what is still in the pipes of a process that has ended
_CHUNK = 65536


class SandboxError(RuntimeError):
    """Isolation failed, and the program was not run; or somebody else ended it. Nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a program. CPU time and file size hold for each of its processes."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 64 << 10
    num_processes: int = 16


@dataclass(frozen=True, slots=True)
class Finished:
    """Outcome of a program. ``code`` is its exit status, 128 + n where signal n ended it."""

    outcome: Outcome
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float = 0.0  # of wall-clock time, without those in which the sandbox was made


class Streams:
    """Feeds and reads a process until it ends or a limit is reached; then ends it, children included."""

    def __init__(
        self, process: subprocess.Popen[bytes], limits: Limits, stop: threading.Event | None = None
    ) -> None:
        self._process, self._limits, self._stop = process, limits, stop
        self._start = self._seconds = 0.0
        self._selector = selectors.DefaultSelector()
        self._got: dict[str, bytes] = {}
        self._names: dict[int, str] = {}
        self._pending: dict[int, bytes] = {}
        assert process.stdout is not None
        assert process.stderr is not None
        self.read("stdout", os.dup(process.stdout.fileno()))
        self.read("stderr", os.dup(process.stderr.fileno()))
        process.stdout.close()
        process.stderr.close()

    def read(self, name: str, descriptor: int) -> None:
        """Collect what comes from a descriptor, which is closed at its end."""
        self._got[name], self._names[descriptor] = b"", name
        self._selector.register(descriptor, selectors.EVENT_READ)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write ``data`` as it is taken, then close the descriptor."""
        os.set_blocking(descriptor, False)
        self._pending[descriptor] = data
        self._selector.register(descriptor, selectors.EVENT_WRITE)

    def finish(self) -> Finished:
        """Wait for the end. Raises SandboxError where the program was never started, or killed by others."""
        outcome = self._wait()
        self._seconds = time.monotonic() - self._start if self._start else 0.0
        self._end()
        report = self._got["report"].decode(errors="replace")
        if not report.startswith("ready"):
            said = report or self._got["stderr"].decode(errors="replace")[-300:] or "nothing"
            raise SandboxError(f"isolation failed: {' '.join(said.split()).removeprefix('error ')}")
        if outcome == "exited":
            outcome = _read_outcome(report.split())
        stdout, stderr = self._got["stdout"], self._got["stderr"]
        limit = self._limits.output_bytes
        code, seconds = _exit_status(self._process), self._seconds
        return Finished(outcome, code, stdout[:limit], stderr[-limit:], seconds)

    def close(self) -> None:
        """End the process and close what is open."""
        self._end()
        for descriptor in [*self._names, *self._pending]:
            self._close(descriptor)
        self._selector.close()

    def _wait(self) -> Outcome:
        ready = False
        deadline = time.monotonic() + _ISOLATION_SECONDS
        while True:
            if not ready and self._got["report"]:
                ready, self._start = True, time.monotonic()
                deadline = self._start + self._limits.wall_seconds
            if self._process.poll() is not None:
                self._drain()
                return "exited"
            if time.monotonic() > deadline:
                return "timeout"
            if self._stop is not None and self._stop.is_set():
                return "stopped"
            self._pump(0.02)
            if max(len(data) for data in self._got.values()) > self._limits.output_bytes:
                return "output"

    def _drain(self) -> None:
        self._end()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._names and time.monotonic() < deadline:
            self._pump(0.02)

    def _pump(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            descriptor = key.fd
            if descriptor in self._names:
                data = os.read(descriptor, _CHUNK)
                name = self._names[descriptor]
                if len(self._got[name]) <= self._limits.output_bytes:
                    self._got[name] += data
                if not data:
                    self._close(descriptor)
            else:
                try:
                    count = os.write(descriptor, self._pending[descriptor][:_CHUNK])
                except BrokenPipeError:
                    count = len(self._pending[descriptor])
                except BlockingIOError:
                    continue
                self._pending[descriptor] = self._pending[descriptor][count:]
                if not self._pending[descriptor]:
                    self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        self._names.pop(descriptor, None)
        self._pending.pop(descriptor, None)
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Its children, which are ours now (adopt_orphans): until they are reaped they count as processes of
        # their user, and process 1 may take its time.
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self._process.pid, 0)


def _read_outcome(report: list[str]) -> Outcome:
    """Return how a program ended by itself; raise SandboxError if something outside ended it."""
    for outcome in ("memory", "disk", "processes"):
        if outcome in report:
            return cast(Outcome, outcome)
    if "cpu" in report:
        return "timeout"
    if "ended" not in report:
        raise SandboxError("the program was killed from outside (is the machine short of memory?)")
    return "exited"


def _exit_status(process: subprocess.Popen[bytes]) -> int:
    code = process.wait()
    return code if code >= 0 else 128 - code
