"""Retention of checkpoints, and the commit of background saves; with a stand-in trainer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megarl.runs import checkpoint_manager
from megarl.runs.checkpoint_manager import CheckpointManager
from megarl.config.checkpoint import CheckpointConfig
from megarl.metrics.console import Console
from megarl.run_directory import RunDirectory


class Pending:
    def __init__(self, directory: Path) -> None:
        self.directory, self.written = directory, False

    def done(self) -> bool:
        return self.written

    def finish(self) -> None:
        self.written = True
        (self.directory / "metadata.json").write_text("{}")


class Trainer:
    """Saves nothing, slowly."""

    def __init__(self) -> None:
        self.saves: list[Pending] = []

    def save(self, directory: Path, *, optimizer: bool) -> None:
        (directory / "metadata.json").write_text("{}")

    def start_save(self, directory: Path, *, optimizer: bool) -> Pending:
        self.saves.append(Pending(directory))
        return self.saves[-1]


class Saver:
    """Checkpoints of a run directory in ``folder``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.directory = RunDirectory(folder)
        self.directory.open({})
        self.said = io.StringIO()
        console = Console("sft", stream=self.said)
        self.trainer: Any = Trainer()
        self.checkpoints = CheckpointManager(
            CheckpointConfig(**options), self.directory, console, is_first=True
        )

    def save(self, step: int, **values: float) -> list[int]:
        self.checkpoints.save(step, self.trainer, {"position": step}, values)
        return self.directory.checkpoint_steps()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_manager, "gather", lambda value: [value])
    monkeypatch.setattr(checkpoint_manager, "barrier", lambda: None)


def test_the_best_outlives_newer_ones(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, keep_best_metric="accuracy")
    assert saver.save(1, accuracy=0.2) == [1]
    assert saver.save(2, accuracy=0.9) == [1, 2]
    assert saver.save(3, accuracy=0.5) == [2, 3]
    assert saver.save(4, accuracy=0.5) == [2, 3, 4]
    assert saver.save(5, accuracy=0.9) == [2, 4, 5]  # the earlier of equals
    assert saver.save(6, accuracy=0.95) == [5, 6]
    assert "checkpoint step_2 has the best accuracy so far" in saver.said.getvalue()
    # A later process knows as much.
    saver.directory.close()
    later = Saver(tmp_path, keep=1, keep_best_metric="accuracy")
    assert later.save(7, accuracy=0.1) == [6, 7]


def test_the_smallest_can_be_the_best(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, keep_best_metric="loss", keep_best_mode="min")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        kept = saver.save(step, loss=loss)
    assert kept == [2, 3]


def test_a_step_without_the_metric_is_not_the_best_and_says_so(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, keep_best_metric="accuracy")
    saver.save(1, accuracy=0.1)
    assert saver.save(2, loss=1.0) == [1, 2]
    assert saver.save(3, accuracy=float("nan")) == [1, 3]
    said = saver.said.getvalue()
    assert "step 2 has no accuracy, so its checkpoint cannot be the best one (that step has loss)" in said
    assert "step 3 has no accuracy, so its checkpoint cannot be the best one (is NaN there)" in said


def test_a_background_save_is_committed_between_steps(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=5, async_save=True)
    checkpoints = saver.checkpoints
    assert saver.save(1) == []
    assert checkpoints.is_pending
    checkpoints.poll()
    assert saver.directory.checkpoint_steps() == []  # still being written
    saver.trainer.saves[0].written = True
    checkpoints.poll()
    assert saver.directory.checkpoint_steps() == [1]
    state = json.loads((saver.directory.checkpoint_path(1) / "run_state.json").read_text())
    assert state == {"step": 1, "optimizer": True, "position": 1}
    # The next save waits for the one before it, and the end of the run for the last.
    saver.save(2)
    assert saver.save(3) == [1, 2]
    checkpoints.wait()
    checkpoints.wait()
    assert saver.directory.checkpoint_steps() == [1, 2, 3]
    assert checkpoints.take_blocked_seconds() > 0
    assert checkpoints.take_blocked_seconds() == 0
    assert saver.said.getvalue().count("in the background") == 3
