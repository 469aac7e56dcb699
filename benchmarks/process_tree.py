"""A command with all the processes it starts, and the most memory they held together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

_MARK = "MEGARL_BENCH_TREE"
_INTERVAL_SECONDS = 0.5


def run_measured(command: list[str], environment: dict[str, str], log: Path) -> float:
    """Run ``command`` to its end, output into ``log``; returns the peak of its processes' memory in GiB.

    The memory is the sum of proportional set sizes (/proc/PID/smaps_rollup), in which a page shared by
    several processes counts once, read twice a second. Processes are told by a variable they inherit,
    so daemons that have left the process tree count too. Raises RuntimeError with the log's end where
    the command fails.
    """
    mark = uuid.uuid4().hex
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, _MARK: mark},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        peak, done = [0.0], threading.Event()
        sampler = threading.Thread(target=_sample, args=(f"{_MARK}={mark}".encode(), peak, done))
        sampler.start()
        code = process.wait()
        done.set()
        sampler.join()
    if code:
        tail = "\n".join(log.read_text().splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}:\n{tail}")
    return peak[0]


def _sample(mark: bytes, peak: list[float], done: threading.Event) -> None:
    known: dict[int, bool] = {os.getpid(): False}
    while not done.wait(_INTERVAL_SECONDS):
        total = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            pid = int(folder.name)
            try:
                if not known.get(pid):
                    # A child shows its parent's environment until it has called exec: ask again later.
                    known[pid] = mark in (folder / "environ").read_bytes().split(b"\0")
                if known[pid]:
                    total += _pss_kib(folder)
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue  # another user's, or it has just ended
        peak[0] = max(peak[0], total / 2**20)


def _pss_kib(folder: Path) -> int:
    for line in (folder / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


if sys.platform != "linux":
    raise RuntimeError("benchmarks.process_tree reads /proc")
