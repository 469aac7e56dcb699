"""Trackio."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Literal

from megarl.config.logging import TrackioConfig
from megarl.metrics.sink import Rows, RunInfo, Sink, table


class TrackioSink(Sink):
    """A Trackio run; a resumed run continues that of its name."""

    def __init__(self, run: RunInfo, config: TrackioConfig) -> None:
        import trackio

        self._trackio = trackio
        with redirect_stdout(io.StringIO()):  # advice on its dashboard
            self._run = trackio.init(
                project=config.project,
                name=config.name or run.name,
                space_id=config.space_id,
                config=dict(run.config),
                resume="allow" if run.resumed_after is not None else "never",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of the step."""
        self._run.log(dict(values), step=step)

    def log_rows(self, kind: Literal["samples", "evaluations"], step: int, rows: Rows) -> None:
        """Record a table under the name of its kind."""
        import pandas

        columns, data = table(kind, rows)
        self._run.log(
            {kind: self._trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))}, step=step
        )

    def close(self) -> None:
        """Wait until everything is stored."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()
