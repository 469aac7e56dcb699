"""Records of a benchmark's file, and reading of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.rows import unreachable
from megarl.environments.text import number_text
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.benchmarks import BenchmarkSource

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """One problem: the text for the model and the data for its verifier.

    ``answer`` is the reference as text; ``metadata`` is merged into the prompt's.
    """

    text: str
    answer: str
    category: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: its location on the hub, and ``question``, which converts (row, index)."""

    hub: str
    subset: str | None
    split: str
    question: Callable[[Row, int], Question]


class BadRow(ValueError):
    """A row that does not have the benchmark's layout; the message gives the reason."""


def text_of(row: Row, *names: str) -> str:
    """Return the first column of ``names`` in the row (case-insensitive), as non-empty text."""
    by_name = {name.lower(): value for name, value in row.items()}
    for name in names:
        if name.lower() in by_name:
            value = by_name[name.lower()]
            text = value.strip() if isinstance(value, str) else ""
            if isinstance(value, int | float) and math.isfinite(value):
                text = number_text(value)
            if not text:
                raise BadRow(f"column {name!r} holds no text (found {value!r})")
            return text
    raise BadRow(f"no column {' or '.join(map(repr, names))}; it has {', '.join(map(repr, row))}")


def raw_text_of(row: Row, name: str) -> str:
    """Return a text column with its surrounding white space, which matters in Python code."""
    text_of(row, name)
    return str(row[name])


def choice_question(
    problem: str, options: list[str], right: int, category: str | None = None, **metadata: Any
) -> Question:
    """Build a question with lettered options; the model is asked for the letter."""
    if not 0 <= right < len(options) <= len(LETTERS):
        raise BadRow(f"answer {right} of {len(options)} options")
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    letters = f"{', '.join(LETTERS[: len(options) - 1])} or {LETTERS[len(options) - 1]}"
    text = f"{problem.strip()}\n\n" + "\n".join(lines)
    text += f'\n\nThink, then end with a line "Answer: X", where X is {letters}.'
    return Question(text, LETTERS[right], category, {"choices": options, **metadata})


def math_question(problem: str, answer: str, category: str | None = None) -> Question:
    """Build a problem whose result goes into a box (LaTeX)."""
    text = f"{problem.strip()}\n\nPut the final result into \\boxed{{}}."
    return Question(text, answer, category)


def code_question(text: str, tests: str, solution: Any, prefix: str = "") -> Question:
    """Build a programming task; ``tests`` is Python that raises if the code before it is wrong.

    ``prefix`` is code given by the task (imports and the function's signature).
    """
    return Question(text, str(solution or ""), None, {"tests": tests, "prefix": prefix})


def read_rows(source: BenchmarkSource, benchmark: Benchmark, where: str) -> list[Row]:
    """Read the rows of a local copy, or from the hub through `datasets`.

    ``where`` is the configuration key. Raises UserError if the data is missing, unreadable or empty.
    """
    from datasets import load_dataset

    split, subset = source.split or benchmark.split, source.subset or benchmark.subset
    hub = source.hub or benchmark.hub
    try:
        if source.directory is None:
            dataset = load_dataset(hub, subset, split=split)
        elif (path := Path(source.directory)).is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            dataset = load_dataset(kind, data_files=str(path), split="train")
        else:
            folder = path / subset if subset and (path / subset).is_dir() else path
            dataset = load_dataset(str(folder), split=split)
    except Exception as error:  # datasets raises some twenty types
        named = source.directory or f"{hub} ({subset or 'default'}) from the hub"
        there = None if source.directory else unreachable(error, hub, subset)
        reason = there or " ".join(str(error).split())[:300]
        raise UserError(f"{where}: cannot read split {split!r} of {named}: {reason}") from error
    if not len(dataset):
        raise UserError(f"{where}: no rows")
    return [dict(row) for row in dataset]
