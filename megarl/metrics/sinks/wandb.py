"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from megarl.config.logging import WandbConfig
from megarl.metrics.sink import Rows, RunInfo, Sink, table


class WandbSink(Sink):
    """A W&B run that keeps its id across restarts; curves are plotted over ``step``."""

    def __init__(self, run: RunInfo, config: WandbConfig) -> None:
        import wandb

        self._wandb = wandb
        # Without this folder wandb would write to the system's temporary directory, and not say so.
        (run.directory / "wandb").mkdir(exist_ok=True)
        self._run = wandb.init(
            project=config.project or os.environ.get("WANDB_PROJECT") or "megarl",
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            mode=config.mode,
            dir=str(run.directory),
            name=config.name or run.name,
            id=run.kept_id("wandb"),
            resume="allow",
            config=dict(run.config),
            # console capture would record progress bars character by character
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.url = self._run.url
        self._run.define_metric("step")
        # W&B drops rows whose counter goes backwards, as after a resume: plot over ``step``.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of the step as one row."""
        self._run.log({"step": step, **values})

    def log_rows(self, kind: Literal["samples", "evaluations"], step: int, rows: Rows) -> None:
        """Send a table under the name of its kind; values of any type become text."""
        columns, data = table(kind, rows)
        shown = [[_shown(value) for value in row] for row in data]
        self._run.log({"step": step, kind: self._wandb.Table(columns=columns, data=shown)})

    def close(self) -> None:
        """Finish the run; waits until the upload is complete."""
        self._run.finish()


def _shown(value: Any) -> Any:
    """Return a value of a type that every row of a column can have."""
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
