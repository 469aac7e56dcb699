"""Runs ways_out.py in every isolation that works here, by a Python without this project's dependencies.

Argument: a folder. Prints lines of JSON: isolation, way, and "yes" (it holds), "ended" (the program was ended
for it) or "no"; or isolation, "" and why it does not work.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLAIN_PYTHON = "/usr/bin/python3.11"  # one that others than root can reach


def load() -> tuple[Any, Any, Any]:
    """The sandbox and the programs, for a Python that has nothing of this project's dependencies."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/environments")]
    package = types.ModuleType("megarl.environments")
    package.__path__ = [str(ROOT / "megarl/environments")]
    __import__("megarl")
    sys.modules["megarl.environments"] = package
    from megarl.environments import sandbox, sandbox_streams

    return sandbox, sandbox_streams.Limits, __import__("ways_out")


def main() -> None:
    """See above."""
    sandbox, Limits, ways = load()
    if os.geteuid() == 0:
        sandbox.python_path = lambda: PLAIN_PYTHON
        sandbox.visible_paths = lambda: [path for path in sandbox._SYSTEM_PATHS if os.path.exists(path)]
    limits = Limits(6.0, 6, 128 << 20, 4 << 20, num_processes=12)
    folder = Path(sys.argv[1])
    for isolation in sandbox.ISOLATIONS:
        if problem := sandbox._problem(isolation):
            print(json.dumps([isolation, "", problem]))
            continue
        for name, text in ways.WAYS.items():
            print(json.dumps([isolation, name, _holds(sandbox, limits, isolation, text, ways.HEAD, folder)]))


def _holds(sandbox: Any, limits: Any, isolation: str, text: str, head: str, folder: Path) -> str:
    folder.chmod(0o777)
    file, path = folder / "file", folder / "socket"
    file.write_text("secret")
    file.chmod(0o666)
    victim = subprocess.Popen(["/bin/sleep", "60"])
    marker = f"way-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        path.chmod(0o777)
        head += (
            f"VICTIM, FILE, FOLDER, SOCKET = {victim.pid}, {str(file)!r}, {str(folder)!r}, {str(path)!r}\n"
        )
        head += f"DISK, TASKS, MEMORY = {limits.disk_bytes}, {limits.num_processes}, {limits.memory_bytes}\n"
        done = sandbox.run(sandbox.Program({"main.py": head + text}, arguments=[marker]), limits, isolation)
        receiver.setblocking(False)
        try:
            received = bool(receiver.recv(100))
        except BlockingIOError:
            received = False
    hurt = victim.poll() is not None or received or not file.exists() or file.read_text() != "secret"
    hurt = hurt or sorted(each.name for each in folder.iterdir()) != ["file", "socket"] or _is_left(marker)
    victim.kill()
    victim.wait()
    path.unlink()
    assert b"Traceback" not in done.stderr, done
    if done.outcome in ("memory", "disk", "processes") and not hurt:
        return "ended"
    return "no" if hurt or b"open" in done.stdout else "yes"


def _is_left(marker: str) -> bool:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in words:
            return True
    return False


if __name__ == "__main__":
    main()
