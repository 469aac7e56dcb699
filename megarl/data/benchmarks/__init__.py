"""Public benchmarks: one file each, which says where it lies and what a row means."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, read_rows
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.benchmarks import BenchmarkSource

__all__ = ["Benchmark", "Question", "find", "load_questions"]


def find(source: BenchmarkSource) -> Benchmark:
    """The benchmark of that name."""
    benchmark: Benchmark = importlib.import_module(f"megarl.data.benchmarks.{source.name}").BENCHMARK
    return benchmark


def load_questions(source: BenchmarkSource, field: str) -> list[Question]:
    """Every problem in the data set's order; ``field`` is the source's key, e.g. data.held_out.

    Raises:
        UserError: nothing to read, or the first row that is not in the benchmark's layout, by number.
    """
    benchmark = find(source)
    questions = []
    for index, row in enumerate(read_rows(source, benchmark, f"{field}.directory")):
        try:
            questions.append(benchmark.question(row, index))
        except BadRow as error:
            raise UserError(f"{field}: row {index} is not one of {source.name}: {error}") from error
    return questions
