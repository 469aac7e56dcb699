"""Runs one program in isolation; started as a file by :mod:`megarl.environments.sandbox`.

Arguments are descriptors: request, report, and the two that the program finds as 3 and 4, if any. The request
is JSON. The report gets lines: "ready" when the program is about to start; then "ended" when it has ended by
itself, "cpu", "memory", "disk" or "processes" when a limit ended it, "killed" when somebody else did; or
"error ..." when isolation failed: then no line of the program has run. Exit status: the program's own, or
128 + n where signal n ended it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
system: Any = importlib.import_module("sandbox_system")

_POLL_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")
_BLOCK = 512  # of st_blocks
_INODES = 4096
# Threads that the user's other processes may start meanwhile, where they count too.
_SPARE_TASKS = 64
_SPARE_BYTES = 256 << 10  # for the program's own text and folders
_KERNEL_SETTINGS = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def main() -> None:
    """Isolate this process, then become the program, watched by its parent."""
    request, report, *channel = (fcntl.fcntl(int(text), fcntl.F_DUPFD_CLOEXEC, 20) for text in sys.argv[1:])
    os.closerange(3, 20)
    try:
        with os.fdopen(request, "rb") as stream:
            spec = json.loads(stream.read())
        beside_others = spec["isolation"] == "landlock"
        if not beside_others:  # there the watcher must end the others first
            system.die_with_parent()
        folder = _enter(spec, report)
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        _limit(spec)
        system.no_new_privileges()
        if beside_others:
            _become(spec["uid"])
            _write_files(folder, spec["files"])
            os.chdir(folder)
            system.landlock([*spec["visible"]], [folder, *_DEVICES])
        system.seccomp(beside_others=beside_others)
        system.drop_capabilities()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number, descriptor in enumerate(channel, start=3):
            os.dup2(descriptor, number)
        os.write(report, b"ready\n")
    except BaseException as error:
        os.write(report, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.execve(spec["command"][0], spec["command"], environment)


def _enter(spec: dict[str, Any], report: int) -> str:
    """Returns in the program's process its folder; the one that forked it watches it."""
    isolation, uid, gid = spec["isolation"], spec["uid"] or os.getuid(), spec["uid"] or os.getgid()
    if isolation == "landlock":
        system.adopt_orphans()
        usage: Callable[[], str] = lambda: _excess_beside_others(spec)  # noqa: E731
        _fork_program(spec, report, usage)
        return str(spec["folder"])
    if isolation == "namespaces":
        _enter_namespaces(spec, report)
        _build_root(spec, uid, gid)
    else:
        system.unshare(system.CLONE_NEWNS)  # bwrap's belongs to a user namespace above this process's
        _mount_work("/work", spec, uid, gid)
    _cover_kernel_settings()
    _become(spec["uid"])
    os.chdir("/work")
    _write_files("/work", spec["files"])
    _fork_program(spec, report, lambda: _excess_memory(spec, _others()))
    return "/work"


def _enter_namespaces(spec: dict[str, Any], report: int) -> None:
    """Returns in the first process of a PID namespace."""
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
    for path in [*spec["visible"], *_DEVICES]:
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
    _mount_work(f"{root}/work", spec, uid, gid)
    with contextlib.suppress(OSError):  # some containers do not let it be mounted; then it stays empty
        system.mount("proc", f"{root}/proc", "proc", plain)
    system.pivot_root(root)
    system.make_read_only("/", recursive=False)


def _mount_work(path: str, spec: dict[str, Any], uid: int, gid: int) -> None:
    data = f"size={spec['disk_bytes']},nr_inodes={_INODES},mode=700,uid={uid},gid={gid}"
    system.mount("tmpfs", path, "tmpfs", system.MS_NOSUID | system.MS_NODEV, data)


def _cover_kernel_settings() -> None:
    for path in _KERNEL_SETTINGS:
        if os.path.exists(path):
            system.mount(path, path, None, system.MS_BIND | system.MS_REC)
            system.make_read_only(path, recursive=True)


def _fork_program(spec: dict[str, Any], report: int, excess: Callable[[], str]) -> None:
    """Returns in a child; this process watches it, and ends when it does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    if spec["isolation"] != "landlock":
        system.hide_memory()  # from the program, which shows its own again when it starts
    program = os.fork()
    if not program:
        system.die_with_parent()
        return
    if spec["isolation"] != "landlock":
        # A program that got hold of the first process of its namespace would have gained nothing.
        system.drop_capabilities()
        system.no_new_privileges()
        system.seccomp(beside_others=False)
    for descriptor in range(3):
        os.close(descriptor)
    reader = select.poll()  # who started this: bwrap, between the two, may not signal another user's process
    reader.register(report, 0)
    while True:  # until the program's end, or until it takes more than it may
        _reap(spec, program, report)
        signal.sigtimedwait((signal.SIGCHLD,), _POLL_SECONDS)
        if reader.poll(0):
            _end_all(spec)
        if reason := excess():
            os.write(report, f"{reason}\n".encode())
            os._exit(128 + signal.SIGKILL)


def _reap(spec: dict[str, Any], program: int, report: int) -> None:
    """Children that have ended; where the program is one of them this process ends like it."""
    while True:
        ended, status, used = os.wait4(-1, os.WNOHANG)
        if not ended:
            return
        if ended == program:
            os.write(report, f"{_how(status, used.ru_utime + used.ru_stime, spec)}\n".encode())
            _exit_like(status)


def _how(status: int, cpu_seconds: float, spec: dict[str, Any]) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_seconds >= spec["cpu_seconds"]):
        return "cpu"
    return "killed" if number == signal.SIGKILL else "ended"


def _end_all(spec: dict[str, Any]) -> None:
    """Whoever started this has ended: so do the program and all that it started. Does not return."""
    if spec["isolation"] != "landlock":
        os._exit(1)  # of the first process of a namespace: the kernel ends the others
    for _ in range(100):
        left = list(_descendants(os.getpid()))
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            break
    shutil.rmtree(spec["folder"], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _others() -> list[int]:
    """All processes of this PID namespace but the first; none where /proc is not there."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    yield child
                    yield from _descendants(child)


def _excess_memory(spec: dict[str, Any], pids: list[int]) -> str:
    """Return the exceeded memory limit, if any; pages shared by several processes count once."""
    if sum(map(_resident, pids)) <= spec["memory_bytes"]:
        return ""
    return "memory" if sum(map(_proportional, pids)) > spec["memory_bytes"] else ""


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except OSError:
        return _resident(pid)


def _excess_beside_others(spec: dict[str, Any]) -> str:
    """Return the exceeded limit, without a namespace: processes, memory, files (open deleted ones too)."""
    pids = list(_descendants(os.getpid()))
    if sum(map(_num_tasks, pids)) > spec["num_processes"]:
        return "processes"
    sizes: dict[tuple[int, int], int] = {}
    for path in [*_files(spec["folder"]), *(path for pid in pids for path in _open_files(pid))]:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            sizes[found.st_dev, found.st_ino] = min(found.st_size, found.st_blocks * _BLOCK)
            if len(sizes) > _INODES:
                return "disk"
    return "disk" if sum(sizes.values()) > spec["disk_bytes"] + _SPARE_BYTES else _excess_memory(spec, pids)


def _num_tasks(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _files(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder):
        yield from (os.path.join(path, name) for name in (*folders, *names))


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(OSError):
                if os.readlink(path).endswith(" (deleted)"):
                    yield path


def _limit(spec: dict[str, Any]) -> None:
    tasks = spec["num_processes"]
    if spec["isolation"] == "landlock" and not spec["uid"]:
        tasks += _num_tasks_of(os.getuid()) + _SPARE_TASKS  # the watcher knows the program's own
    for name, value in (
        (resource.RLIMIT_AS, spec["memory_bytes"]),
        (resource.RLIMIT_FSIZE, spec["disk_bytes"]),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu_seconds"], spec["cpu_seconds"] + 1))


def _num_tasks_of(uid: int) -> int:
    """Processes and threads of a user."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += _num_tasks(int(name))
    return count


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
