"""Runs one program in isolation; started as a file by :mod:`megarl.environments.sandbox`.

Arguments are descriptors: request, report, and the two that the program finds as 3 and 4, if any. The
request is JSON. The report gets a line "ready" when the program is about to start, "memory" when it was ended
for its memory, and "error ..." when isolation failed: then no line of the program has run. Exit status: the
program's own, 128 + n where signal n ended it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
system: Any = importlib.import_module("sandbox_system")

_POLL_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Isolate this process, then become the program."""
    request, report, *channel = (fcntl.fcntl(int(text), fcntl.F_DUPFD_CLOEXEC, 20) for text in sys.argv[1:])
    os.closerange(3, 20)
    try:
        with os.fdopen(request, "rb") as stream:
            spec = json.loads(stream.read())
        system.die_with_parent()
        if spec["isolation"] == "namespaces":
            _enter_namespaces(spec, report)
            folder = "/work"
        else:
            folder = spec["folder"]
        _write_files(folder, spec["files"])
        os.chdir(folder)
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        _limit(spec)
        system.no_new_privileges()
        if spec["isolation"] == "landlock":
            _become(spec["uid"])
            devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
            system.landlock(spec["visible"], [folder, *devices])
        system.seccomp(beside_others=spec["isolation"] == "landlock")
        for number, descriptor in enumerate(channel, start=3):
            os.dup2(descriptor, number)
        os.write(report, b"ready\n")
    except BaseException as error:
        os.write(report, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.execve(spec["command"][0], spec["command"], environment)


def _enter_namespaces(spec: dict[str, Any], report: int) -> None:
    """Returns in the program's process, the second of a PID namespace; its first one watches it."""
    uid, gid, is_root = os.getuid(), os.getgid(), os.geteuid() == 0
    flags = system.CLONE_NEWNS | system.CLONE_NEWPID | system.CLONE_NEWNET | system.CLONE_NEWIPC
    system.unshare(flags | system.CLONE_NEWUTS | (0 if is_root else system.CLONE_NEWUSER))
    if not is_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    if first := os.fork():
        os.close(report)
        _exit_like(os.waitpid(first, 0)[1])
    system.die_with_parent()
    _build_root(spec, spec["uid"] or uid, spec["uid"] or gid)
    _become(spec["uid"])
    if program := os.fork():
        _watch(program, spec["memory_bytes"], report)


def _become(uid: int) -> None:
    """Give up being root for a user that nobody is (0: stay who this is)."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        system.die_with_parent()  # changing the user forgets it


def _build_root(spec: dict[str, Any], uid: int, gid: int) -> None:
    """A root directory of read-only binds and one small place to write to."""
    root = spec["folder"]
    plain = system.MS_NOSUID | system.MS_NODEV
    system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
    system.mount("tmpfs", root, "tmpfs", plain, "size=1m,mode=755")
    for path in [*spec["visible"], "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]:
        target = root + path
        if os.path.islink(path):  # /lib where it is usr/lib
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            _write(target, "")
        system.mount(path, target, None, system.MS_BIND | system.MS_REC)
        if not path.startswith("/dev/"):
            system.make_read_only(target, recursive=True)
    for name in ("proc", "work"):
        os.mkdir(f"{root}/{name}")
    os.symlink("work", f"{root}/tmp")
    disk = f"size={spec['disk_bytes']},nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    system.mount("tmpfs", f"{root}/work", "tmpfs", plain, disk)
    with contextlib.suppress(OSError):  # some containers do not let it be mounted; then it stays empty
        system.mount("proc", f"{root}/proc", "proc", plain)
    system.pivot_root(root)
    system.make_read_only("/", recursive=False)


def _watch(program: int, memory_bytes: int, report: int) -> None:
    """The namespace's first process: ends when the program does, and everything in it with it."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == program:
            _exit_like(status)
        if ended == 0:
            if _resident_bytes() > memory_bytes:
                os.write(report, b"memory\n")
                os._exit(128 + signal.SIGKILL)
            time.sleep(_POLL_SECONDS)


def _resident_bytes() -> int:
    """Memory of all processes here but the first; 0 where /proc is not there."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with contextlib.suppress(OSError), open(f"/proc/{name}/statm") as file:
                total += int(file.read().split()[1]) * _PAGE
    return total


def _limit(spec: dict[str, Any]) -> None:
    for name, value in (
        (resource.RLIMIT_CPU, spec["cpu_seconds"]),
        (resource.RLIMIT_AS, spec["memory_bytes"]),
        (resource.RLIMIT_FSIZE, spec["disk_bytes"]),
        (resource.RLIMIT_NPROC, spec["num_processes"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def _write_files(folder: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        _write(os.path.join(folder, name), text)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _exit_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
