"""AIME: problem, and an integer from 0 to 999; columns of the datasets of 2024 or 2025."""

from __future__ import annotations

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, Row, math_question, text_of


def _question(row: Row, index: int) -> Question:
    answer = text_of(row, "answer")
    if not answer.isdecimal() or int(answer) > 999:
        raise BadRow(f"an AIME answer is an integer from 0 to 999 (found {answer!r})")
    return math_question(text_of(row, "problem", "question"), str(int(answer)))


BENCHMARK = Benchmark("HuggingFaceH4/aime_2024", None, "train", _question)
