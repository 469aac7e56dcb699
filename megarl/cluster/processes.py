"""Cleanup of child processes and shared memory after a killed process."""

from __future__ import annotations

import ctypes
import re
import signal
from collections.abc import Iterable
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """For ``preexec_fn``: have the kernel send SIGKILL to the child when its parent thread exits."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def own_shared_memory() -> list[str]:
    """Return the names of mapped segments of Python's ``multiprocessing.shared_memory``."""
    maps = Path("/proc/self/maps").read_text()
    return sorted(set(re.findall(rf"{_SHARED_MEMORY}/(psm_\w+)", maps)))


def unlink_shared_memory(names: Iterable[str]) -> None:
    """Remove segments left by a killed process; missing ones are ignored."""
    for name in names:
        (_SHARED_MEMORY / name).unlink(missing_ok=True)
