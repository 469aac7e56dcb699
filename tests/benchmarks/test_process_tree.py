"""Peak memory of a command includes its children, daemons too, and counts shared pages once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.process_tree import run_measured

# 300 MiB shared with a forked child, and a daemon in another session with 200 more. On a busy machine a
# daemon takes seconds to start: all wait for it. The sampler reads one process after the other, so the child
# begins and ends while the daemon is not there; otherwise its shared pages could count twice.
PROGRAM = """
import os, signal, subprocess, sys, time
held = bytearray(os.urandom(1)) * (300 * 2**20)
child = os.fork()
if child == 0:
    time.sleep(120)
    os._exit(0)
code = "import os, time; held = b'x' * (200 * 2**20); print('held', flush=True); time.sleep(120)"
daemon = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
daemon.stdout.readline()
time.sleep(5)
daemon.kill()
daemon.wait()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""


def test_peak_is_of_all_processes_together(tmp_path: Path) -> None:
    peak = run_measured([sys.executable, "-c", PROGRAM], {}, tmp_path / "log")
    assert 500 / 1024 < peak.gib < 580 / 1024
    assert sum(peak.processes.values()) == pytest.approx(peak.gib)


def test_a_command_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3:\nthe reason"):
        run_measured([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], {}, tmp_path / "log")
