"""The loop over given examples without a model: the rows of a step, and when held-out rows are evaluated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.sft import SftConfig
from megarl.loops.offline import OfflineLoop
from megarl.metrics.timers import PhaseTimers

GYM = {"source": "reasoning_gym", "task": "chain_sum"}


class Rows:
    """A dataset of so many rows; a batch is its row numbers."""

    is_mixture, parts, reports, stream = False, (), (), None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, rows: list[int]) -> list[int]:
        return rows


def run(**training: Any) -> tuple[list[list[int]], list[int]]:
    """The rows of each step, and the steps after which held-out rows were evaluated."""
    config = SftConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": "unused"},
            "optimizer": {"lr": 1e-3},
            "data": {"train": GYM, "held_out": {**GYM, "size": 400, "seed": 9_000_000}},
            "training": {"num_steps": 7, "validation_size": 3, **training},
        }
    )
    taken: list[list[int]] = []
    validated: list[int] = []

    def prepare(batch: list[int], aggregation: str, group_size: int) -> Any:
        return SimpleNamespace(batches=batch, num_tokens=1, split_counts={})

    def step(batches: list[int], loss: Any) -> dict[str, float]:
        taken.append(batches)
        return {"loss": 1.0}

    def validate(batches: list[int], loss: Any) -> dict[str, float]:
        assert batches == [0, 1, 2]
        validated.append(len(taken))
        return {"validation_loss": 1.0}

    objective: Any = SimpleNamespace(
        trained=SimpleNamespace(prepare=prepare),
        group_size=1,
        headlines=("loss",),
        loss=lambda data, rows, batch: None,
        step=step,
        validate=validate,
        state=dict,
    )
    timers = PhaseTimers()
    loop_run: Any = SimpleNamespace(
        timers=timers,
        memory=SimpleNamespace(measure=lambda trained: None),
        console=SimpleNamespace(end_steps=lambda: None),
        begin_steps=lambda: None,
        check=lambda step, values: None,
        log=lambda step, values: timers.end_step(),
        after_step=lambda *args: None,
    )
    held_out: Any = Rows(5)
    loop: Any = OfflineLoop(config, loop_run, objective, Rows(20), held_out)  # type: ignore[type-var,arg-type]
    loop.run({"step": 0, "position": 0, "totals": {}})
    return taken, validated


@pytest.mark.parametrize("size", [3, 5])
def test_rows_of_a_step(size: int) -> None:
    """A step takes batch_size rows and goes on where the one before it ended, epoch by epoch."""
    taken, _ = run(batch_size=size)
    assert [len(rows) for rows in taken] == [size] * 7
    rows = [row for step in taken for row in step]
    assert sorted(rows[:20]) == list(range(20))
    assert len(set(rows[20:40])) == len(rows[20:40])


@pytest.mark.parametrize(("interval", "steps"), [(0, [7]), (2, [2, 4, 6, 7]), (7, [7])])
def test_when_held_out_rows_are_evaluated(interval: int, steps: list[int]) -> None:
    assert run(batch_size=2, validation_interval=interval)[1] == steps
