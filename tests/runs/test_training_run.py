"""The frame of a run: how often its report is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.checkpoint import CheckpointConfig
from megarl.config.logging import LoggingConfig
from megarl.runs import training_run
from megarl.runs.training_run import TrainingRun


@pytest.mark.parametrize(("interval", "written"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (50, [7])])
def test_a_report_is_written_every_so_many_steps_and_at_the_end(
    interval: int, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    run: Any = TrainingRun.__new__(TrainingRun)
    run.config = SimpleNamespace(
        checkpoint=CheckpointConfig(interval=0), logging=LoggingConfig(report_interval=interval)
    )
    run.checkpoints = SimpleNamespace(poll=lambda: None, wait=lambda: None, save=lambda *args: None)
    run.is_first, run._spoiled, run._base, run._values = True, False, {}, {}
    run.directory = SimpleNamespace(path=Path("unused"))
    monkeypatch.setattr(run, "signal_number", lambda: None)
    monkeypatch.setattr(training_run, "write_report", lambda path: found.append(run._checked))
    for step in range(1, 8):
        run._checked = step
        run.after_step(step, 7, SimpleNamespace(), {})
    assert found == written
