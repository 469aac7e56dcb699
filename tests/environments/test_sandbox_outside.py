"""The sandbox beside others: the user's processes, who kills and is killed; how an isolation is chosen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.environments import sandbox
from megarl.environments.sandbox import Program, run
from megarl.environments.sandbox_streams import Limits, SandboxError

ROOT = Path(__file__).parents[2]
PLAIN_PYTHON = "/usr/bin/python3.11"  # one that others than root can reach
LIMITS = Limits(wall_seconds=20.0)


@pytest.fixture(params=["namespaces", "bubblewrap", "landlock"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each isolation that works on this machine; Landlock as root needs a Python that nobody can reach."""
    if request.param == "landlock" and os.geteuid() == 0:
        if not os.path.exists(PLAIN_PYTHON):
            pytest.skip("no Python outside root's home")
        monkeypatch.setattr(sandbox, "python_path", lambda: PLAIN_PYTHON)
        paths = [path for path in sandbox._SYSTEM_PATHS if os.path.exists(path)]
        monkeypatch.setattr(sandbox, "visible_paths", lambda: paths)
    if problem := sandbox._problem(request.param):
        pytest.skip(problem)
    return request.param


def processes(marker: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    named = [each for each in found if marker in (each.info["cmdline"] or [])]
    return [each for each in named if each.info["status"] != psutil.STATUS_ZOMBIE]


def test_a_thread_and_a_child_run_whatever_else_the_user_runs(isolation: Any):
    others = [subprocess.Popen(["/bin/sleep", "60"]) for _ in range(LIMITS.num_processes + 4)]
    text = (
        "import subprocess, threading\n"
        "t = threading.Thread(target=print, args=['thread'])\nt.start()\nt.join()\n"
        "p = subprocess.Popen(['/bin/sleep', '60'])\np.kill()\nprint(p.wait(), flush=True)\n"
        "subprocess.run(['/bin/echo', 'child'])\n"
    )
    try:
        finished = run(Program({"main.py": text}), LIMITS, isolation)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert finished.stdout.decode() == "thread\n-9\nchild\n", finished


@pytest.mark.parametrize("which", ["program", "watcher"])
def test_what_is_killed_from_outside_has_not_failed(isolation: Any, which: str):
    """As the kernel does when memory is short: to the program, or to the process that watches it."""
    marker = f"marker-{os.getpid()}-{which}"
    program = Program({"main.py": "import time\ntime.sleep(30)\n"}, arguments=[marker])
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 20
        while not (found := processes(marker)) and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = found[0] if which == "program" else found[0].parent()
        if victim is not None and victim.pid != os.getpid():
            victim.kill()
            killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxError, match="killed from outside"):
        run(program, LIMITS, isolation)
    thread.join()
    assert killed.is_set()


def test_a_program_cannot_pretend_to_be_killed_from_outside(isolation: Any):
    text = (
        "import os, resource, signal, threading\n"
        "for call in (lambda: os.kill(os.getpid(), 9), lambda: os.kill(0, 9), lambda: os.kill(-1, 9),\n"
        "             lambda: signal.pthread_kill(threading.main_thread().ident, 9),\n"
        "             lambda: resource.setrlimit(resource.RLIMIT_CPU, (0, 0))):\n"
        "    try:\n        call()\n    except (OSError, ValueError):\n        print('no')\n"
    )
    finished = run(Program({"main.py": text}), LIMITS, isolation)
    assert (finished.outcome, finished.stdout) == ("exited", b"no\n" * 5), finished


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"])
def test_a_program_that_computes_for_too_long_has_timed_out(isolation: Any, first: str):
    limits = Limits(wall_seconds=100.0, cpu_seconds=1)
    finished = run(Program({"main.py": f"{first}while True:\n    pass\n"}), limits, isolation)
    assert finished.outcome == "timeout", finished
    assert finished.seconds < 90


def test_memory_that_processes_share_counts_once(isolation: Any):
    text = (
        "import os, time\nx = bytearray(90 << 20)\nx[::4096] = b'x' * len(x[::4096])\n"
        "for _ in range(3):\n    if os.fork() == 0:\n        time.sleep(0.5)\n        os._exit(0)\n"
        "for _ in range(3):\n    os.wait()\nprint('done')\n"
    )
    limits = Limits(wall_seconds=20.0, memory_bytes=200 << 20)
    assert run(Program({"main.py": text}), limits, isolation).stdout == b"done\n"


ORPHANS = """
import os, sys, types
sys.path.insert(0, {root!r})
package = types.ModuleType("megarl.environments")
package.__path__ = [{root!r} + "/megarl/environments"]
import megarl
sys.modules["megarl.environments"] = package
from megarl.environments import sandbox
from megarl.environments.sandbox_streams import Limits
if {plain}:
    sandbox.python_path = lambda: {python!r}
    sandbox.visible_paths = lambda: [path for path in sandbox._SYSTEM_PATHS if os.path.exists(path)]
text = '''
import os, time
for _ in range(3):
    if os.fork() == 0:
        break
open(f"big{{os.getpid()}}", "wb").write(bytes(1 << 20))
time.sleep(600)
'''
program = sandbox.Program({{"main.py": text}}, arguments=[{marker!r}])
sandbox.run(program, Limits(wall_seconds=600), {isolation!r})
"""


def test_nothing_outlives_the_worker(isolation: Any, tmp_path: Path):
    """The process that runs programs is killed: they end, their children, and their files with them."""
    marker = f"orphan-{os.getpid()}"
    plain = isolation == "landlock" and os.geteuid() == 0
    code = ORPHANS.format(
        root=str(ROOT), plain=plain, python=PLAIN_PYTHON, marker=marker, isolation=isolation
    )
    folder = Path(f"/tmp/megarl-orphans-{os.getpid()}") if plain else tmp_path  # where others can go
    folder.mkdir(mode=0o755, exist_ok=True)
    worker = subprocess.Popen([sys.executable, "-B", "-c", code], env={**os.environ, "TMPDIR": str(folder)})
    try:
        deadline = time.monotonic() + 30
        while len(processes(marker)) < 4:
            assert time.monotonic() < deadline, processes(marker)
            assert worker.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        worker.kill()
        worker.wait()
    deadline = time.monotonic() + 10
    while (left := processes(marker)) or list(folder.iterdir()):
        assert time.monotonic() < deadline, (left, list(folder.iterdir()))
        time.sleep(0.05)
    folder.rmdir()


def test_auto_takes_what_holds_most_whatever_its_name(monkeypatch: pytest.MonkeyPatch):
    leaks: dict[str, tuple[str, ...]] = {"namespaces": ("a", "b"), "bubblewrap": (), "landlock": ("a",)}
    works = {"namespaces", "bubblewrap", "landlock"}
    monkeypatch.setattr(sandbox, "_problem", lambda name: None if name in works else "broken")
    monkeypatch.setattr(sandbox, "not_held", lambda name: leaks[name])
    choose = sandbox.choose.__wrapped__
    assert choose("auto") == "bubblewrap"
    works.remove("bubblewrap")
    assert choose("auto") == "landlock"
    assert choose("namespaces") == "namespaces"
    leaks["namespaces"] = ("b",)
    assert choose("auto") == "namespaces"
    assert sandbox.describe("landlock") == "landlock, seccomp, resource limits; not held: a"


def test_the_probe_sees_what_holds_here(isolation: Any):
    sandbox.not_held.cache_clear()
    found = sandbox.not_held(isolation)
    sandbox.not_held.cache_clear()
    if isolation != "landlock":
        assert found == ()
    else:
        assert "existence and sizes of other files" in found
        assert not {"network", "signals to other processes", "memory outside of all limits"} & set(found)


def test_the_probe_finds_what_is_open(tmp_path: Path):
    """Run without any sandbox it names what a sandbox is for."""
    command = [sys.executable, "-I", str(sandbox._PROBE), str(os.getpid()), "/etc/passwd", "4096", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    missing = {"network", "signals to other processes", "existence and sizes of other files"}
    missing |= {"memory outside of all limits", "num_processes but for what is seen in time"}
    assert missing <= set(done.stdout.splitlines())


def test_the_first_process_of_a_namespace_is_filtered_and_kernel_settings_are_covered(isolation: Any):
    if isolation == "landlock":
        pytest.skip("no namespace")
    text = (
        "lines = [line.split() for line in open('/proc/1/status')]\n"
        "print([line[1] for line in lines if line[0] in ('Seccomp:', 'NoNewPrivs:')])\n"
        "for path in ('/proc/1/mem', '/proc/sys/kernel/core_pattern', '/proc/sys/vm/swappiness'):\n"
        "    try:\n        open(path, 'r+').close()\n        print(path)\n"
        "    except OSError:\n        print('no')\n"
    )
    finished = run(Program({"main.py": text}), LIMITS, isolation)
    assert finished.stdout.decode() == "['1', '2']\nno\nno\nno\n", finished


def test_who_ends_by_a_signal_of_its_own_is_told_so(isolation: Any):
    for name in ("SIGTERM", "SIGABRT"):
        text = f"import os, signal\nos.kill(os.getpid(), signal.{name})\n"
        finished = run(Program({"main.py": text}), LIMITS, isolation)
        assert (finished.outcome, finished.code) == ("exited", 128 + getattr(signal, name))
