"""Child processes that do not outlive their parent, and shared memory that does not outlive its process."""

from __future__ import annotations

import ctypes
import re
import signal
from collections.abc import Iterable
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """For ``preexec_fn``: SIGKILL to the child when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def own_shared_memory() -> list[str]:
    """Names of the segments of Python's ``multiprocessing.shared_memory`` that this process has mapped."""
    maps = Path("/proc/self/maps").read_text()
    return sorted(set(re.findall(rf"{_SHARED_MEMORY}/(psm_\w+)", maps)))


def unlink_shared_memory(names: Iterable[str]) -> None:
    """Remove segments whose process was killed before it could; those it did remove are left alone."""
    for name in names:
        (_SHARED_MEMORY / name).unlink(missing_ok=True)
