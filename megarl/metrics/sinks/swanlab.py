"""SwanLab."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megarl.config.logging import SwanlabConfig
from megarl.metrics.sink import RunInfo, Sink


class SwanlabSink(Sink):
    """A SwanLab experiment that a resumed run continues."""

    def __init__(self, run: RunInfo, config: SwanlabConfig) -> None:
        import swanlab

        folder = run.directory / "swanlab"
        folder.mkdir(exist_ok=True)
        mode = {"online": "cloud", "offline": "offline"}[config.mode]
        self._run = swanlab.init(
            project=config.project,
            workspace=config.workspace,
            experiment_name=config.name or run.name,
            config=dict(run.config),
            mode=mode,
            logdir=str(folder),
            id=run.kept_id("swanlab"),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the finite values of the step; SwanLab takes no others."""
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Finish the experiment."""
        self._run.finish()
