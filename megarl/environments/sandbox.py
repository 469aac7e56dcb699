"""Running untrusted Python: isolated, limited in every resource, and ended in time whatever it does.

Isolation, the strongest that works here:

- ``namespaces``: MegaRL makes them itself (as root, or where users may): own processes, network (without even
  a loopback device that is up), mounts: only Python and the system's libraries are there, read-only, and a
  small place in memory to write to.
- ``bubblewrap``: bwrap, where it is installed, makes the namespaces; the rest is as above.
- ``landlock``: no namespaces; Landlock refuses to open every file but those, seccomp refuses what else could
  reach other processes and files.

In all of them seccomp refuses sockets, tracing, keys and further namespaces, no privileges can be gained, and
resource limits hold; a watcher ends the program where it and its children together take too much. Where none
works nothing is run. docs/guides/code.md has a table of what holds where.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megarl.environments import sandbox_system
from megarl.environments.sandbox_streams import Finished, Limits, SandboxError, Streams
from megarl.errors import UserError

Isolation = Literal["bubblewrap", "namespaces", "landlock"]
ISOLATIONS: tuple[Isolation, ...] = ("namespaces", "bubblewrap", "landlock")

_CHILD = Path(__file__).with_name("sandbox_child.py")
_PROBE = Path(__file__).with_name("sandbox_probe.py")
_SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
# User ids that nobody has, so that RLIMIT_NPROC counts one program's processes.
_FIRST_UID, _NUM_UIDS = 1 << 30, 1 << 29
_FIRST_PIDS = 50


@dataclass(slots=True)
class Program:
    """A Python program: ``files`` by name in its working directory, of which ``main`` is run.

    ``channel``: two descriptors, which it finds as 3 (to read) and 4 (to write); they are closed here.
    """

    files: dict[str, str]
    main: str = "main.py"
    stdin: bytes = b""
    channel: tuple[int, int] | None = None
    arguments: list[str] = field(default_factory=list)


def run(
    program: Program, limits: Limits, isolation: Isolation, stop: threading.Event | None = None
) -> Finished:
    """Run it to its end, to a limit, or until ``stop`` is set (outcome "stopped").

    Raises:
        SandboxError: the isolation could not be made; no line of the program has run.
    """
    folder = tempfile.mkdtemp(prefix="megarl-sandbox-") if isolation == "landlock" else ""
    try:
        return _run(program, limits, isolation, folder, stop)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        for descriptor in program.channel or ():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        program.channel = None


def _run(
    program: Program, limits: Limits, isolation: Isolation, folder: str, stop: threading.Event | None
) -> Finished:
    uid = 0
    if os.geteuid() == 0:
        uid = _FIRST_UID + random.SystemRandom().randrange(_NUM_UIDS)
        if folder:
            os.chown(folder, uid, uid)
    python, visible = python_path(), visible_paths()
    spec = {
        "isolation": isolation,
        "folder": folder or _mount_point(visible),
        "visible": visible,
        "files": program.files,
        "command": [python, "-I", "-S", "-B", program.main, *program.arguments],
        "uid": uid,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "disk_bytes": limits.disk_bytes,
        "num_processes": limits.num_processes,
    }
    pipes = request, report = os.pipe(), os.pipe()
    inherited = (request[0], report[1], *(program.channel or ()))
    child, wrapper = str(_CHILD), []
    if isolation == "bubblewrap":
        child, wrapper = f"/megarl/{_CHILD.name}", _bubblewrap(visible, limits)
    command = [*wrapper, python, "-I", "-S", "-B", child, *map(str, inherited)]
    sandbox_system.adopt_orphans()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            pass_fds=inherited,
            start_new_session=True,
        )
    except BaseException:
        for pipe in pipes:
            os.close(pipe[0])
            os.close(pipe[1])
        raise
    program.channel = None
    for descriptor in inherited:
        os.close(descriptor)
    streams = Streams(process, limits, stop)
    streams.read("report", report[0])
    streams.write(request[1], json.dumps(spec).encode())
    assert process.stdin is not None
    streams.write(os.dup(process.stdin.fileno()), program.stdin)
    process.stdin.close()
    try:
        return streams.finish()
    finally:
        streams.close()


def _mount_point(visible: list[str]) -> str:
    """A directory over which a namespace's root can be mounted: none that a visible path lies in."""
    for path in ("/mnt", "/media", "/srv", "/opt", "/var", "/home", "/tmp"):
        if os.path.isdir(path) and not any(f"{each}/".startswith(f"{path}/") for each in visible):
            return path
    raise SandboxError("no directory to mount on")


def _bubblewrap(visible: list[str], limits: Limits) -> list[str]:
    """bwrap's command line; the child, first process of the PID namespace, does the rest inside.

    It keeps what it needs to give up being root, to mount its directory and to cover kernel settings, and
    drops it before the program starts.
    """
    command = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--as-pid-1"]
    command += ["--die-with-parent"]  # and no --new-session: its group is what is ended and reaped
    # Root needs no user namespace: in one that bwrap makes it would be root outside still.
    kept = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID") if os.geteuid() == 0 else ("CAP_SYS_ADMIN",)
    command += [] if os.geteuid() == 0 else ["--unshare-user"]
    command += ["--cap-drop", "ALL", *(part for name in kept for part in ("--cap-add", name))]
    for path in visible:
        for parent in reversed(Path(path).parents[:-1]):  # bwrap would make them for root alone
            command += ["--perms", "0755", "--dir", str(parent)]
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--ro-bind", str(_CHILD.parent), "/megarl", "--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(limits.disk_bytes), "--tmpfs", "/work", "--symlink", "work", "/tmp"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/"]


def python_path() -> str:
    """The interpreter that programs run in: this one, without its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible_paths() -> list[str]:
    """Return the paths a program can read: system libraries and this Python, without installed packages."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in _SYSTEM_PATHS if os.path.exists(path)]
    return paths if prefix.startswith("/usr/") or prefix == "/usr" else [*paths, prefix]


@functools.cache
def choose(wanted: Isolation | Literal["auto"] = "auto", field: str = "isolation") -> Isolation:
    """The isolation in which the least gets through here, or the one that is wanted; each is tried.

    Raises:
        UserError: none works, with what each said.
    """
    reasons: list[str] = []
    leaks: dict[Isolation, int] = {}
    for isolation in ISOLATIONS if wanted == "auto" else (wanted,):
        problem = _problem(isolation)
        if problem is None:
            leaks[isolation] = len(not_held(isolation))
            if not leaks[isolation]:
                break
        else:
            reasons.append(f"{isolation}: {problem}")
    if not leaks:
        raise UserError(f"{field}: programs cannot be isolated here ({'; '.join(reasons)})")
    return min(leaks, key=lambda isolation: leaks[isolation])


def describe(isolation: Isolation) -> str:
    """An isolation for the log: what it is made of, and what it does not hold here."""
    leaks = not_held(isolation)
    return f"{isolation}, seccomp, resource limits" + (f"; not held: {', '.join(leaks)}" if leaks else "")


@functools.cache
def not_held(isolation: Isolation) -> tuple[str, ...]:
    """Return what a program can do in this isolation on this machine that it should not, by trying.

    Raises:
        SandboxError: the isolation does not work.
    """
    limits = Limits(wall_seconds=30.0, num_processes=4)
    # In a PID namespace of its own a program's processes have the first numbers.
    process = os.getpid() if os.getpid() > _FIRST_PIDS else 0
    arguments = [str(process), "/etc/passwd", str(limits.disk_bytes), str(limits.num_processes)]
    program = Program({"main.py": _PROBE.read_text(encoding="utf-8")}, arguments=arguments)
    finished = run(program, limits, isolation)
    if finished.outcome == "processes":
        program.arguments[-1] = "0"
        finished = run(program, limits, isolation)
    if finished.outcome != "exited" or finished.code:
        raise SandboxError(
            f"a program that looks around ended by {finished.outcome}: {finished.stderr[-200:]!r}"
        )
    return tuple(filter(None, finished.stdout.decode().splitlines()))


def _problem(isolation: Isolation) -> str | None:
    """Return why an isolation does not work here; None if it does."""
    if os.uname().machine != "x86_64":
        return "only on x86_64"
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if isolation == "landlock" and not sandbox_system.landlock_version():
        return "the kernel has no Landlock"
    try:
        finished = run(Program({"main.py": "print(40 + 2)"}), Limits(wall_seconds=30.0), isolation)
    except SandboxError as error:
        return str(error)
    if finished.stdout != b"42\n":
        return f"a test program gave {finished.stdout!r} {finished.stderr[-200:]!r}"
    return None
