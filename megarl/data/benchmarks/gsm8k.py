"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): question; answer ends in "#### 42"."""

from __future__ import annotations

from megarl.data.benchmarks.base import BadRow, Benchmark, Question, Row, math_question, text_of


def _question(row: Row, index: int) -> Question:
    _, mark, answer = text_of(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise BadRow("column 'answer' does not end in '#### RESULT'")
    return math_question(text_of(row, "question"), answer.strip().replace(",", ""))


BENCHMARK = Benchmark("openai/gsm8k", "main", "test", _question)
