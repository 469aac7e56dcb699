"""metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping

from megarl.metrics.sink import Sink
from megarl.run_directory import RunDirectory


class JsonlSink(Sink):
    """metrics.jsonl; the run directory owns the file."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._run_directory = run_directory

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of the step; it is on disk on return."""
        self._run_directory.append_metrics(step, values)
