"""Run a command and measure the peak memory of all its processes together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "MEGARL_BENCH_TREE"
_INTERVAL_SECONDS = 0.5


@dataclass(slots=True)
class Peak:
    """The peak memory in GiB, and each process's share of it, by name."""

    gib: float = 0.0
    processes: dict[str, float] = field(default_factory=dict)


def run_measured(command: list[str], environment: dict[str, str], log: Path) -> Peak:
    """Run ``command`` to its end, output into ``log``; return the peak of its processes' memory.

    The memory is the sum of proportional set sizes (/proc/PID/smaps_rollup), in which a page shared by
    several processes counts once, read twice a second. Processes are identified by an inherited environment
    variable, so daemons that have left the process tree count too.

    Raises:
        RuntimeError: the command failed; has the log's end.
    """
    mark = uuid.uuid4().hex
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, _MARK: mark},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        peak, done = Peak(), threading.Event()
        sampler = threading.Thread(target=_sample, args=(f"{_MARK}={mark}".encode(), peak, done))
        sampler.start()
        code = process.wait()
        done.set()
        sampler.join()
    if code:
        tail = "\n".join(log.read_text().splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}:\n{tail}")
    return peak


def _sample(mark: bytes, peak: Peak, done: threading.Event) -> None:
    known: dict[int, bool] = {os.getpid(): False}
    while not done.wait(_INTERVAL_SECONDS):
        found: dict[str, float] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            pid = int(folder.name)
            try:
                if not known.get(pid):
                    # A child has its parent's environment until it has called exec: check again later.
                    known[pid] = mark in (folder / "environ").read_bytes().split(b"\0")
                if known[pid]:
                    name = _name(folder)
                    found[name] = found.get(name, 0.0) + _pss_kib(folder) / 2**20
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue  # another user's process, or one that has just ended
        if (total := sum(found.values())) > peak.gib:
            peak.gib, peak.processes = total, found


def _name(folder: Path) -> str:
    """Return a process's title, the module or script of a Python program, or the program's file."""
    words = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    program = Path(words[0]).name
    if not program.startswith("python") or len(words) < 2:
        return program.split(" ")[0] if words[0].startswith("/") else words[0].strip()
    named = words[2] if words[1] == "-m" and len(words) > 2 else words[-1] if words[1] == "-c" else words[1]
    return Path(named).name[:60] if words[1] != "-c" else "python -c"


def _pss_kib(folder: Path) -> int:
    for line in (folder / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


if sys.platform != "linux":
    raise RuntimeError("benchmarks.process_tree reads /proc")
