"""MMLU (Hendrycks et al. 2020, arXiv:2009.03300): question, four choices, index of the answer, subject."""

from __future__ import annotations

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, Row, choice_question, text_of


def _question(row: Row, index: int) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int):
        raise BadRow("columns 'choices' and 'answer' must be a list and the index of the answer")
    return choice_question(text_of(row, "question"), choices, answer, text_of(row, "subject"))


BENCHMARK = Benchmark("cais/mmlu", "all", "test", _question)
