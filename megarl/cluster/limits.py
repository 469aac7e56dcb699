"""Check the machine before a process starts: temporary directory, shared memory, open files."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import MutableMapping
from pathlib import Path

from megarl.errors import UserError

# Sockets of torch's shared memory take 34 bytes below it, and a socket's path is limited to 107.
_MAX_TEMP_DIR = 72
_DEFAULT_TEMP_DIR = "/tmp"
_SHARED_MEMORY = Path("/dev/shm")
_SPARE_BYTES = 2**20  # beside the weights: buffers of multiprocessing
_LEAST_OPEN_FILES = 128
_LEAST_ADDRESS_SPACE = 4 * 2**30


def choose_temp_dir(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Replace a TMPDIR in which libraries cannot work; return a note about it, None if it is left.

    Python takes another directory by itself; torch and Ray fail in ways that do not name it.
    """
    asked = environ.get("TMPDIR")
    if asked is None:
        return None
    if len(os.fsencode(asked)) > _MAX_TEMP_DIR:
        why = f"longer than {_MAX_TEMP_DIR} bytes, too long for sockets"
    elif not Path(asked).is_dir():
        why = "no directory here"
    elif not os.access(asked, os.W_OK | os.X_OK):
        why = "not writable"
    else:
        return None
    environ["TMPDIR"] = _DEFAULT_TEMP_DIR
    return f"TMPDIR: {asked} is {why}; using {_DEFAULT_TEMP_DIR}"


def check_limits() -> None:
    """Raise the limit of open files as far as it may be raised; refuse limits with which nothing starts.

    Raises:
        UserError: names the limit and the command that sets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < _LEAST_OPEN_FILES:
        raise UserError(f"ulimit -n: {hard} open files are too few; at least {_LEAST_OPEN_FILES} are needed")
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY and space < _LEAST_ADDRESS_SPACE:
        raise UserError(
            f"ulimit -v: {space // 2**20} MiB of address space are too few: the libraries alone map "
            f"{_LEAST_ADDRESS_SPACE // 2**20} MiB; ulimit -v unlimited"
        )


def available_memory() -> int:
    """Return the memory in bytes that processes may still take here: of the machine, within the limit of the
    control group.
    """
    kib = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = int(kib[1]) * 1024 if kib else 0
    limit = memory_limit()
    return free if limit is None else min(free, limit)


def memory_limit() -> int | None:
    """Return the control group's limit in bytes, None without."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def check_shared_memory(weight_bytes: int, directory: Path = _SHARED_MEMORY) -> None:
    """Refuse a /dev/shm that cannot hold the weights, which trainer and engine share there on a CPU.

    Raises:
        UserError: says how large it is, what is needed and how to enlarge it.
    """
    free = shutil.disk_usage(directory).free if directory.is_dir() else 0
    needed = weight_bytes + _SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{directory}: {free / 2**20:.1f} MiB free, but trainer and engine share the weights there: "
            f"{needed / 2**20:.1f} MiB; enlarge it (docker run --shm-size=8g, or "
            f"mount -o remount,size=8g {directory})"
        )
