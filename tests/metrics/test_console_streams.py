"""The console survives the end of its stream, and copies every line to a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megarl.metrics.console import Console

LINES = """
import sys
from pathlib import Path
from megarl.metrics.console import Console

console = Console("sft")
console.keep_log(Path(sys.argv[1]))
console.note("before")
sys.stdin.readline()
for number in range(3):
    console.note(f"line {number}")
console.close()
print("a library's own line")
"""


def test_a_reader_that_ends_costs_no_line_and_no_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    process = subprocess.Popen(
        [sys.executable, "-c", LINES, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == b"before\n"
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0
    assert errors == b""
    assert log.read_text().splitlines() == ["before", "line 0", "line 1", "line 2"]


def test_a_full_disk_costs_the_log_alone(tmp_path: Path) -> None:
    with open(os.devnull, "w") as stream:
        console = Console("sft", stream=stream)
        console.keep_log(Path("/dev/full"))
        console.note("lost in the log")
        console.note("nor is this an error")
        console.close()


def test_other_ranks_write_no_log(tmp_path: Path) -> None:
    console = Console("sft", enabled=False)
    console.keep_log(tmp_path / "console.log")
    console.note("silent")
    assert not (tmp_path / "console.log").exists()
