"""Ranks that die, stop or hang: real processes, their last output, and how the others end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megarl.cluster import heartbeat

# A rank without a trainer: phases, progress as asked for, and a heartbeat with a short time-out.
RANK = """
import pathlib, sys, time
from megarl.cluster.heartbeat import Heartbeat
folder, rank, size, mode = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
progress = 0
phases = ("train", "optimizer")
beat = Heartbeat(folder, rank, size, 1.0, lambda: (phases, progress))
beat.start()
beat.step = 7

def stuck_in_a_collective():
    time.sleep(60)

for _ in range(600):
    time.sleep(0.02)
    if mode == "hang":
        if rank == 1:
            phases = ("train", "forward_backward")
        stuck_in_a_collective()
    if mode == "crash" and rank == 1 and progress == 10:
        import ctypes
        ctypes.string_at(0)
    if mode == "raise" and rank == 1 and progress == 10:
        try:
            raise ValueError("no such thing")
        except ValueError as error:
            beat.stop(error)
            raise
    if mode == "slow" and progress == 100:
        beat.stop()
        break
    if mode == "slow" and rank == 1:
        continue  # waits for rank 0, which is at work
    progress += 1
"""


class Ranks:
    """Processes of RANK and what they print."""

    def __init__(self, folder: Path, size: int, mode: str) -> None:
        self.folder = folder / "ranks"
        heartbeat.clear(self.folder)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(RANK), str(self.folder), str(rank), str(size), mode],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait_until_all_beat(self) -> None:
        end = time.monotonic() + 60
        while True:
            beats = [heartbeat.read_heartbeat(self.folder, rank) for rank in range(len(self.processes))]
            if all(beat is not None and beat["step"] == 7 for beat in beats):
                return
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self, *, but: int | None = None) -> list[str]:
        """Return what each printed when it ended by itself; the process ``but`` is killed afterwards."""
        try:
            said = [
                p.communicate(timeout=60)[1] if rank != but else "" for rank, p in enumerate(self.processes)
            ]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return said


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, "work")
    ranks.wait_until_all_beat()
    killed = ranks.processes[1]
    killed.kill()
    began = time.monotonic()
    ranks.processes[0].wait(30)  # whose neighbour it was
    assert time.monotonic() - began < 10
    said = ranks.end()[0]
    failure = (ranks.folder / "failure.txt").read_text()
    assert (
        f"rank 1 (host {os.uname().nodename}, process {killed.pid}) has died; last seen in step 7" in failure
    )
    assert "phase train > optimizer" in failure
    assert "no traceback" in failure
    assert "ranks 0, 2: step 7, phase train > optimizer" in failure
    assert said == f"error: {failure}"


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    """It cannot report itself: its predecessor does."""
    ranks = Ranks(tmp_path, 2, "work")
    ranks.wait_until_all_beat()
    ranks.processes[1].send_signal(signal.SIGSTOP)
    said = ranks.end(but=1)
    assert "rank 1 " in said[0]
    assert "has sent no heartbeat for 1 s; last seen in step 7, phase train > optimizer" in said[0]
    assert ranks.processes[0].returncode == 1


def test_a_hang_shows_where_the_odd_rank_is(tmp_path: Path) -> None:
    """All ranks wait; the stack of the rank in another phase than most is shown."""
    ranks = Ranks(tmp_path, 3, "hang")
    said = "".join(ranks.end())
    assert said.count("error: ") == 1
    first = said.splitlines()[0]
    assert "rank 1 " in first
    assert "has made no progress for 1 s; last seen in step 7, phase train > forward_backward" in first
    assert "stuck_in_a_collective" in said
    assert "ranks 0, 2: step 7, phase train > optimizer" in said
    assert {process.returncode for process in ranks.processes} == {1}


def test_a_crash_leaves_its_traceback(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, "crash")
    said = ranks.end()[0]
    assert "rank 1 " in said
    assert "Segmentation fault" in said
    assert "string_at" in said


def test_an_error_is_not_a_death(tmp_path: Path) -> None:
    """The rank reports its error itself; its traceback stays in a file."""
    ranks = Ranks(tmp_path, 2, "raise")
    ranks.processes[1].wait(30)
    beat = heartbeat.read_heartbeat(ranks.folder, 1)
    assert beat is not None
    assert beat["state"] == "failed"
    assert "ValueError: no such thing" in heartbeat.traceback_file(ranks.folder, 1).read_text()
    ranks.processes[0].kill()
    said = ranks.end()[1]
    name = f"rank 1 (host {os.uname().nodename}, process {ranks.processes[1].pid})"
    assert said.startswith(f"error: {name} failed; last seen in step 7, phase train > optimizer")
    assert "ValueError: no such thing" in said
    assert not (ranks.folder / "failure.txt").exists()


def test_waiting_for_a_rank_at_work_is_no_hang(tmp_path: Path) -> None:
    """Rank 0 works for two time-outs, with progress; rank 1 waits for it."""
    ranks = Ranks(tmp_path, 2, "slow")
    assert ranks.processes[0].wait(60) == 0
    assert ranks.processes[1].poll() is None
    ranks.processes[1].kill()
    ranks.end()
    assert not (ranks.folder / "failure.txt").exists()
    beat = json.loads(heartbeat.heartbeat_file(ranks.folder, 0).read_text())
    assert beat["state"] == "ended"


@pytest.mark.parametrize(("ranks", "text"), [([0], "0"), ([0, 1, 2, 5], "0-2, 5"), ([3, 5, 6], "3, 5-6")])
def test_spans(ranks: list[int], text: str) -> None:
    assert heartbeat._spans(ranks) == text
