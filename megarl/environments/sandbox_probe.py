"""Probe of a sandbox: run inside, it prints a line for each thing that a program should not be able to do.

Arguments: a process (0: none) and a file of the host that it should know nothing of, disk_bytes, and
num_processes (0: it is known not to hold). The tests try the same at length (tests/environments/escapes.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time


def main() -> None:
    """Try each."""
    process, file = int(sys.argv[1]), sys.argv[2]
    disk_bytes, num_processes = int(sys.argv[3]), int(sys.argv[4])
    folder = os.statvfs(".")
    found = {
        "network": _works(lambda: socket.socket()),
        "signals to other processes": bool(process) and _works(lambda: os.kill(process, 0)),
        "existence and sizes of other files": _works(lambda: os.stat(file)),
        "kernel settings": _works(lambda: open("/proc/sys/kernel/core_pattern", "r+").close()),
        "an unfiltered first process": _is_unfiltered(),
        "memory outside of all limits": _works(lambda: os.memfd_create("x")) or _has_shared_memory(),
        "disk_mib but for what is seen in time": folder.f_blocks * folder.f_frsize > 2 * disk_bytes,
        "num_processes but for what is seen in time": _forks(num_processes + 2) > num_processes
        if num_processes
        else True,
    }
    print(*(name for name, is_open in found.items() if is_open), sep="\n")


def _works(attempt: object) -> bool:
    try:
        attempt()  # type: ignore[operator]
    except OSError:
        return False
    return True


def _is_unfiltered() -> bool:
    with contextlib.suppress(OSError), open("/proc/1/status") as status:
        return "Seccomp:\t2" not in status.read()
    return False


def _has_shared_memory() -> bool:
    return ctypes.CDLL(None, use_errno=True).shmget(0, 4096, 0o1600) >= 0


def _forks(count: int) -> int:
    """Return the number of concurrent children that can be started, up to a count."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        while len(children) < count:
            child = os.fork()
            if not child:
                time.sleep(5)
                os._exit(0)
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGTERM)
    for child in children:
        os.waitpid(child, 0)
    return len(children)


if __name__ == "__main__":
    main()
