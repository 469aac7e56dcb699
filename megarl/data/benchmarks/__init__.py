"""Public benchmarks, one file each: location on the hub and conversion of rows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, read_rows
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.benchmarks import BenchmarkSource

__all__ = ["Benchmark", "Question", "find", "load_questions"]


def find(source: BenchmarkSource) -> Benchmark:
    """Return the benchmark of a source."""
    benchmark: Benchmark = importlib.import_module(f"megarl.data.benchmarks.{source.name}").BENCHMARK
    return benchmark


def load_questions(source: BenchmarkSource, field: str) -> list[Question]:
    """Return all problems in the dataset's order; ``field`` is the source's key, e.g. data.held_out.

    Raises:
        UserError: no data, or a row without the benchmark's layout (the first, by number).
    """
    benchmark = find(source)
    questions = []
    for index, row in enumerate(read_rows(source, benchmark, f"{field}.directory")):
        try:
            questions.append(benchmark.question(row, index))
        except BadRow as error:
            raise UserError(
                f"{field}: row {index} does not have the layout of {source.name}: {error}"
            ) from error
    return questions
