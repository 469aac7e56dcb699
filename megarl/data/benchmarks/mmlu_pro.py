"""MMLU-Pro (Wang et al. 2024, arXiv:2406.01574): question, up to ten options, answer letter, category."""

from __future__ import annotations

from megarl.data.benchmarks.base import LETTERS, BadRow, Benchmark, Question, Row, choice_question, text_of


def _question(row: Row, index: int) -> Question:
    options, letter = row.get("options"), text_of(row, "answer")
    if not isinstance(options, list) or len(letter) != 1 or letter not in LETTERS:
        raise BadRow("columns 'options' and 'answer' must be a list and the letter of the answer")
    right = LETTERS.index(letter)
    if row.get("answer_index", right) != right:
        raise BadRow(f"answer {letter} and answer_index {row['answer_index']} disagree")
    return choice_question(text_of(row, "question"), options, right, text_of(row, "category"))


BENCHMARK = Benchmark("TIGER-Lab/MMLU-Pro", None, "test", _question)
