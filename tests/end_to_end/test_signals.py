"""A signal ends a run with a checkpoint, wherever its output goes and whoever started the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.harness import ROOT, SFT, checkpoints, read_steps, wait_until, write_config

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHERS: dict[str, list[str]] = {
    "one": [],
    "two": ["parallel.num_processes=2"],
    "ray": ["parallel.num_processes=2", "launcher=ray"],
}


def as_at_a_terminal() -> None:
    """Undo what the tests' own parent may ignore, as a shell does for its background jobs."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def nohup() -> None:
    as_at_a_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def start(arguments: list[str], output: str, errors: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """The command, its standard output a terminal, a pipe or a file; descriptors of the reading end."""
    command = [sys.executable, "-m", "megarl.cli", *arguments]
    if output == "tty":
        reading, writing = os.openpty()
    elif output == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = -1, os.open(errors.with_suffix(".out"), os.O_CREAT | os.O_WRONLY)
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=writing,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=nohup if output == "nohup" else as_at_a_terminal,
        )
    os.close(writing)
    return process, [reading] if reading >= 0 else []


def drained(descriptors: list[int]) -> None:
    """Read the available output, so a full pipe never blocks the command."""
    for descriptor in descriptors:
        os.set_blocking(descriptor, False)
        try:
            while os.read(descriptor, 65536):
                pass
        except (BlockingIOError, OSError):
            pass


CASES = [
    pytest.param(launcher, output, number, marks=[] if fast else pytest.mark.slow)
    for launcher in LAUNCHERS
    for output in ("tty", "pipe", "nohup")
    for number in SIGNALS
    for fast in [(launcher, output, number) == ("one", "pipe", signal.SIGINT)]
]


@pytest.mark.parametrize(("launcher", "output", "number"), CASES)
def test_a_signal_ends_with_a_checkpoint(
    launcher: str, output: str, number: signal.Signals, tmp_path: Path, model: Path
) -> None:
    """The reader of a pipe dies, and a terminal is closed, just before the signal, as with `| tee`."""
    directory, log = tmp_path / "run", tmp_path / "errors"
    config = write_config(
        tmp_path / "sft.yaml", SFT, run_dir=directory, model=model, training={"num_steps": 4000}
    )
    process, reading = start(["sft", "--config", str(config), *LAUNCHERS[launcher]], output, log)
    try:
        wait_until(process, lambda: (drained(reading), len(read_steps(directory)) >= 3)[1], log, 600)
        for descriptor in reading:
            os.close(descriptor)
        process.send_signal(number)
        if output == "nohup" and number == signal.SIGHUP:
            before = len(read_steps(directory))
            wait_until(process, lambda: len(read_steps(directory)) >= before + 3, log, 600)
            process.send_signal(number := signal.SIGTERM)
        assert process.wait(300) == 128 + number, log.read_text()
    finally:
        process.kill()
        process.wait()
    stopped = read_steps(directory)[-1]["step"]
    assert checkpoints(directory) == [f"step_{stopped}"]
    shown = (directory / "console.log").read_text()
    assert f"{number.name}: stopped at step {stopped} with a checkpoint" in shown
    assert "Traceback" not in log.read_text()
