"""Running untrusted Python: isolated, limited in every resource, and ended in time whatever it does.

Isolation, the strongest that works here:

- ``bubblewrap``: bwrap, where it is installed, makes the namespaces; the rest is as below.
- ``namespaces``: MegaRL makes them itself (as root, or where users may): own processes, network (without even
  a loopback device that is up), mounts: only Python and the system's libraries are there, read-only, and a
  small place in memory to write to.
- ``landlock``: no namespaces; Landlock refuses every file but those, seccomp refuses sockets, signals and
  sessions.

In all of them seccomp refuses sockets, tracing, keys and further namespaces, no privileges can be gained, and
resource limits hold. Where none works nothing is run.
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
ISOLATIONS: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
# User ids that nobody has, so that RLIMIT_NPROC counts one program's processes.
_FIRST_UID, _NUM_UIDS = 1 << 30, 1 << 29


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
    folder = tempfile.mkdtemp(prefix="megarl-sandbox-")
    try:
        return _run(program, limits, isolation, folder, stop)
    finally:
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
        if isolation == "landlock":
            os.chown(folder, uid, uid)
    python, visible = python_path(), visible_paths()
    spec = {
        "isolation": isolation,
        "folder": folder if isolation != "bubblewrap" else "/work",
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
        child, wrapper = f"/megarl/{_CHILD.name}", _bubblewrap(folder, visible, limits, uid)
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


def _bubblewrap(folder: str, visible: list[str], limits: Limits, uid: int) -> list[str]:
    """bwrap's command line; the child does the rest inside (limits, seccomp)."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",  # and no --new-session: its group is what is ended and reaped
        "--cap-drop",
        "ALL",
    ]
    if uid:
        command += ["--unshare-user", "--uid", str(uid), "--gid", str(uid)]
    for path in visible:
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    command += ["--ro-bind", str(_CHILD.parent), "/megarl", "--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(limits.disk_bytes), "--tmpfs", "/work", "--symlink", "work", "/tmp"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/"]


def python_path() -> str:
    """The interpreter that programs run in: this one, without its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible_paths() -> list[str]:
    """What a program can read: the system's libraries and this Python, without installed packages."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in _SYSTEM_PATHS if os.path.exists(path)]
    return paths if prefix.startswith("/usr/") or prefix == "/usr" else [*paths, prefix]


@functools.cache
def choose(wanted: Isolation | Literal["auto"] = "auto", field: str = "isolation") -> Isolation:
    """The strongest isolation that works here, or the one that is wanted; each is tried by a program.

    Raises:
        UserError: none works, with what each said.
    """
    reasons = []
    for isolation in ISOLATIONS if wanted == "auto" else (wanted,):
        problem = _problem(isolation)
        if problem is None:
            return isolation
        reasons.append(f"{isolation}: {problem}")
    raise UserError(f"{field}: programs cannot be isolated here ({'; '.join(reasons)})")


def _problem(isolation: Isolation) -> str | None:
    """Why an isolation does not work here; None where it does."""
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
