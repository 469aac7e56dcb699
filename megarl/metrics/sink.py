"""The interface of metric sinks (docs/sinks.md): subclass :class:`Sink` to send a run's metrics elsewhere."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarl.run_directory import write_atomically

Rows = Sequence[Mapping[str, Any]]
COLUMNS = {
    "samples": (
        *("step", "prompt_index", "prompt", "response", "answer", "reward", "advantage"),
        *("finish_reason", "num_response_tokens"),
    ),
    "evaluations": ("step", "prompt_index", "prompt", "response", "answer", "correct"),
}
"""Columns of the tables that sinks show; the rows have more."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that a sink is built for."""

    directory: Path
    config: Mapping[str, Any]  # resolved, as in config.yaml
    resumed_after: int | None  # step of the checkpoint; None: from the beginning

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.directory.resolve().name

    def kept_id(self, sink: str) -> str:
        """Return an identifier that a resumed run keeps: 8 hexadecimal digits in <run.dir>/<sink>/run_id."""
        path = self.directory / sink / "run_id"
        path.parent.mkdir(exist_ok=True)
        if self.resumed_after is None or not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8])
        return path.read_text()


class Sink:
    """Receives what a run logs, on rank 0. ``logging.sinks`` names subclasses, built as ``Class(run)``."""

    url: str | None = None
    """Where the run can be seen; the console prints it."""

    def __init__(self, run: RunInfo) -> None:
        """Connect; an exception ends the run with its message, before training."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step. A resumed run repeats the steps after its checkpoint."""
        raise NotImplementedError

    def log_rows(self, kind: Literal["samples", "evaluations"], step: int, rows: Rows) -> None:
        """Record samples of a step or answers of an evaluation; :data:`COLUMNS` of each are always there."""

    def close(self) -> None:
        """Flush buffers; nothing is logged afterwards."""


def table(kind: Literal["samples", "evaluations"], rows: Rows) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of a table of rows, and their values."""
    columns = list(COLUMNS[kind])
    return columns, [[row.get(name) for name in columns] for row in rows]
