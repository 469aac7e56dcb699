"""No command is silent for long, at a terminal and in a pipe."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.harness import make_model
from tools.measure_silence import LIMIT, commands, measure

SLOWLY = """
import sys, time
time.sleep(0.4); print("a", flush=True); time.sleep(0.8); sys.stderr.write("b"); sys.stderr.flush()
time.sleep(0.2); sys.exit(3)
"""


@pytest.mark.parametrize("at_terminal", [False, True])
def test_what_is_measured(tmp_path: Path, at_terminal: bool) -> None:
    found = measure([sys.executable, "-c", SLOWLY], tmp_path, at_terminal=at_terminal)
    assert found.code == 3
    assert 0.4 <= found.first < found.total
    assert 0.5 < found.longest < found.total
    assert found.total >= 1.4


def test_silence_to_the_end_counts(tmp_path: Path) -> None:
    found = measure(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1)"],
        tmp_path,
        at_terminal=False,
    )
    assert found.longest > 0.5  # what is read late shortens it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("at_terminal", [True, False])
def test_no_command_is_silent(model: Path, tmp_path: Path, at_terminal: bool) -> None:
    """For more than two seconds, or what this machine takes now to import torch, which nothing can interrupt.

    In a pipe a line that says what goes on is enough: it does not come again every two seconds.
    """
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers.models.auto"], check=True)
    limit = max(LIMIT, time.monotonic() - started)
    silent = {}
    for name, arguments in commands(model, tmp_path).items():
        found = measure([sys.executable, "-m", "megarl", *arguments], tmp_path, at_terminal=at_terminal)
        assert found.code == (2 if name == "refusal" else 0), name
        seconds = found.longest if at_terminal else found.first
        if seconds > limit:
            silent[name] = seconds
    assert silent == {}, limit
