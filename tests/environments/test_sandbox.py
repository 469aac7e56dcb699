"""The sandbox, by programs that try to get out of it; as root and as nobody, in every isolation there is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.environments import sandbox
from megarl.environments.sandbox import Program, run
from megarl.environments.sandbox_streams import Limits, SandboxError
from megarl.errors import UserError
from tests.environments.escapes import ESCAPES

ROOT = Path(__file__).parents[2]
PLAIN_PYTHON = "/usr/bin/python3.11"  # one that others than root can reach
LIMITS = Limits(wall_seconds=2.0, cpu_seconds=5, memory_bytes=128 << 20, disk_bytes=4 << 20, num_processes=12)
FAST = Limits(wall_seconds=20.0)


# The others take their time too.
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bubblewrap", "landlock")]


@pytest.fixture(params=["namespaces", *_SLOW])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each isolation that works on this machine; Landlock as root needs a Python that nobody can reach."""
    if request.param == "landlock" and os.geteuid() == 0:
        if not os.path.exists(PLAIN_PYTHON):
            pytest.skip("no Python outside root's home")
        monkeypatch.setattr(sandbox, "python_path", lambda: PLAIN_PYTHON)
        monkeypatch.setattr(
            sandbox, "visible_paths", lambda: [p for p in sandbox._SYSTEM_PATHS if os.path.exists(p)]
        )
    if problem := sandbox._problem(request.param):
        pytest.skip(problem)
    return request.param


@pytest.fixture
def port() -> Any:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("name", ESCAPES)
def test_there_is_no_way_out(isolation: Any, name: str, tmp_path: Path, port: int, monkeypatch: Any):
    monkeypatch.setenv("TOKEN", "SECRET")
    (tmp_path / "secret").write_text("SECRET")
    tmp_path.chmod(0o777)
    text, outcome, stdout = ESCAPES[name]
    program = f"HOST, PORT, PARENT = {str(tmp_path)!r}, {port}, {os.getpid()}\n{text}"
    before = {p.pid for p in psutil.process_iter()}
    start = time.monotonic()
    finished = run(Program({"main.py": program}), LIMITS, isolation)
    assert time.monotonic() - start < 30
    assert finished.outcome in outcome, finished
    if outcome == "exited":
        assert finished.stdout.decode() == stdout, finished
    assert len(finished.stdout) <= LIMITS.output_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    deadline = time.monotonic() + 30  # nothing of it is left
    while left := [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and "main.py" in (p.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_program_has_what_it_needs(isolation: Any):
    text = (
        "import collections, ctypes, hashlib, json, math, os, random, re, sys, tempfile, threading\n"
        "with tempfile.NamedTemporaryFile('w+') as file:\n    file.write('x')\n"
        "thread = threading.Thread(target=print, args=['thread'])\nthread.start()\nthread.join()\n"
        "print(sys.stdin.read(), os.getcwd() == os.environ['HOME'], len(os.urandom(4)))\n"
        "print(open('data.txt').read(), file=sys.stderr)\nsys.exit(7)\n"
    )
    finished = run(Program({"main.py": text, "data.txt": "d\u00e4ta"}, stdin=b"in" * 50_000), FAST, isolation)
    assert finished.stdout.decode() == f"thread\n{'in' * 50_000} True 4\n"[: FAST.output_bytes]
    assert (finished.outcome, finished.code) == ("output", finished.code) or finished.code == 7


def test_exit_codes_signals_and_the_channel(isolation: Any):
    assert run(Program({"main.py": "1 / 0"}), FAST, isolation).code == 1
    assert b"ZeroDivisionError" in run(Program({"main.py": "1 / 0"}), FAST, isolation).stderr
    aborts = run(Program({"main.py": "import ctypes\nctypes.string_at(0)"}), FAST, isolation)
    assert aborts.code == 128 + signal.SIGSEGV
    text = "import os\nkey = os.read(3, 100)\nos.write(4, key[::-1])\n"
    there, back = os.pipe(), os.pipe()
    os.write(there[1], b"abc")
    os.close(there[1])
    assert run(Program({"main.py": text}, channel=(there[0], back[1])), FAST, isolation).code == 0
    assert os.read(back[0], 100) == b"cba"
    os.close(back[0])


def test_a_sandbox_that_cannot_be_made_runs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "visible_paths", lambda: ["/no/such/path"])
    with pytest.raises(SandboxError, match="isolation failed: .*/no/such/path"):
        run(Program({"main.py": "print(1)"}), FAST, "namespaces")
    monkeypatch.setattr(sandbox, "_problem", lambda isolation: "broken")
    sandbox.choose.cache_clear()
    with pytest.raises(UserError, match="x.isolation: programs cannot be isolated here .*namespaces: broken"):
        sandbox.choose("auto", "x.isolation")
    sandbox.choose.cache_clear()


NOBODY = """
import json, sys, types
sys.path.insert(0, {root!r})
package = types.ModuleType("megarl.environments")
package.__path__ = [{root!r} + "/megarl/environments"]
import megarl
sys.modules["megarl.environments"] = package
from megarl.environments import sandbox
from megarl.environments.sandbox_streams import Limits
sys.path.insert(0, {root!r} + "/tests/environments")
from escapes import ESCAPES
limits = Limits(wall_seconds=2.0, cpu_seconds=5, memory_bytes=128 << 20, disk_bytes=4 << 20, num_processes=12)
import os
for isolation in sandbox.ISOLATIONS:
    if problem := sandbox._problem(isolation):
        print(json.dumps([isolation, None, problem, ""]))
        continue
    for name, (text, _, _) in ESCAPES.items():
        text = f"HOST, PORT, PARENT = {folder!r}, {port}, {{os.getpid()}}\\n" + text
        done = sandbox.run(sandbox.Program({{"main.py": text}}), limits, isolation)
        print(json.dumps([isolation, name, done.outcome, done.stdout.decode()[:500]]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.skipif(not os.path.exists(PLAIN_PYTHON), reason="no Python outside root's home")
def test_nobody_gets_out_either(tmp_path: Path, port: int):
    folder = Path("/tmp") / f"megarl-sandbox-test-{os.getpid()}"
    folder.mkdir(mode=0o777)
    (folder / "secret").write_text("SECRET")
    code = NOBODY.format(root=str(ROOT), folder=str(folder), port=port)
    try:
        done = subprocess.run(
            [PLAIN_PYTHON, "-B", "-c", code],
            user=65534, group=65534, extra_groups=[], cwd="/",
            env={**os.environ, "TOKEN": "SECRET", "TMPDIR": "/tmp"},
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert sorted(path.name for path in folder.iterdir()) == ["secret"]
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    worked = {isolation for isolation, name, _, _ in rows if name is not None}
    assert worked, rows
    for isolation, name, outcome, stdout in rows:
        if name is not None:
            _, expected, text = ESCAPES[name]
            assert outcome in expected, (isolation, name, outcome, stdout)
            if expected == "exited":
                assert stdout == text, (isolation, name, stdout)
    print(sorted(worked), file=sys.stderr)
