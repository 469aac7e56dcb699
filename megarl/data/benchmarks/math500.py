"""MATH-500 (Lightman et al. 2023, arXiv:2305.20050): problem, answer in LaTeX, subject, level 1 to 5."""

from __future__ import annotations

from megarl.data.benchmarks.base import Benchmark, Question, Row, math_question, text_of


def _question(row: Row, index: int) -> Question:
    return math_question(text_of(row, "problem"), text_of(row, "answer"), text_of(row, "subject"))


BENCHMARK = Benchmark("HuggingFaceH4/MATH-500", None, "test", _question)
