"""Provenance of a run: one line of provenance.jsonl per start of its processes.

Versions of packages and checksums of data and model are in inputs.json (:mod:`megarl.runs.inputs`).
"""

from __future__ import annotations

import os
import platform as machine
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from megarl import __version__, platform
from megarl.cluster.variables import cores
from megarl.run_directory import to_json

_SOURCE = Path(__file__).parents[2]


def describe_start(num_ranks: int, active_parameters: int, memory: Mapping[str, int]) -> dict[str, Any]:
    """Return what is known about this start: time, command, code, machine; rank 0's view.

    ``active_parameters`` are those that a token passes through, ``memory`` rank 0's bytes by part.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["megarl", *sys.argv[1:]]),
        "directory": os.getcwd(),
        "version": __version__,
        "commit": git_commit(_SOURCE),
        "python": machine.python_version(),
        "host": machine.node(),
        "system": machine.platform(),
        "cores": cores(),
        "device": platform.device_name(),
        "num_ranks": num_ranks,
        "active_parameters": active_parameters,
        "memory_bytes": dict(memory),
    }


def git_commit(source: Path) -> str | None:
    """Return the commit of a git checkout, with "+ changes" if files differ from it; None elsewhere."""
    if not (source / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit} + changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):  # no git here, or not ours to read
        return None


def append_start(path: Path, start: dict[str, Any]) -> None:
    """Append one line to provenance.jsonl."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(to_json(start, ensure_ascii=False) + "\n")
